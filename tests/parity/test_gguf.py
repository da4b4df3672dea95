"""transformers reads the GGUF files that we write, and computes the same."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_llm import checkpoints
from tests import exportable, families

pytestmark = pytest.mark.parity

# Settings that transformers does not read from the file, as it takes them to be.
UNREAD = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "gemma3_text": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    },
}


@pytest.mark.parametrize("name", UNREAD)
def test_transformers_reads_our_files(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = exportable.model(name, **UNREAD[name])
    checkpoints.export_gguf(model, None, tmp_path / "model.gguf", dtype="F32")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(2, 40))
    with torch.no_grad():
        expected = reference.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    ours = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))
    assert families.relative_error(ours, expected) < 1e-4
