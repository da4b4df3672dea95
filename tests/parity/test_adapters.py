"""Adapters that PEFT wrote, beside PEFT: logits of its adapted model and of ours, merged."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from tests import families

pytestmark = pytest.mark.parity

LAYERS = ["q_proj", "v_proj", "down_proj"]
ENDS = {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head", "norm"]}
CASES = {
    "list": ("llama", {"target_modules": LAYERS}),
    "regex": ("qwen3", {"target_modules": r".*\.[02]\..*(q|up)_proj", "lora_alpha": 3}),
    "all-linear": ("gemma2", {"target_modules": "all-linear"}),
    "multimodal": ("gemma3", {"target_modules": r".*language_model.*\.(k|gate)_proj"}),
    "rslora": ("mistral", {"target_modules": LAYERS, "use_rslora": True}),
    "dora": ("llama_bias", {"target_modules": LAYERS, "use_dora": True}),
    "patterns": (
        "olmo2",
        {
            "target_modules": LAYERS,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 1.5},
        },
    ),
    "some layers": ("llama", {"target_modules": LAYERS, "layers_to_transform": [0, 2]}),
    "but for": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    ),
    "experts": ("gpt_oss", {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]}),
    "ends": ("llama", ENDS),
    "ends of one table": ("llama_llama3", ENDS),
    "embedding of one table": ("llama_llama3", {"target_modules": ["embed_tokens"]}),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """The directories of a model and of a random adapter, and PEFT's model of both."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.golden import make

    name, settings = CASES[request.param]
    base, adapter = (tmp_path_factory.mktemp(kind) for kind in ("base", "adapter"))
    families.write(name, base)
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "init_lora_weights": False} | settings)
    reference = get_peft_model(make.load(base), config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.mul_(
                    1 + 0.1 * torch.randn_like(parameter)
                )  # also what starts as a copy of the model's own
    reference.save_pretrained(adapter, save_embedding_layers=False)
    return base, adapter, reference


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_logits(pair):
    from tests.golden import make

    base, adapter, reference = pair
    plain, _ = jo.load(base, dtype=jnp.float32)
    tokens = np.random.default_rng(1).integers(plain.config.vocab_size, size=(2, 40))
    expected = make.logits(reference, tokens)
    assert families.relative_error(plain(tokens), expected) > 1e-2
    merged = jo.load_adapter(adapter).merge(plain)
    assert families.relative_error(merged(tokens), expected) < 1e-4
    read, _ = jo.load(base, dtype=jnp.float32, adapter=adapter)
    assert families.relative_error(read(tokens), expected) < 1e-4
    if not plain.config.tied:  # PEFT merges into the one table, and changes both ends
        assert (
            families.relative_error(merged(tokens), make.logits(reference.merge_and_unload(), tokens)) < 1e-4
        )
