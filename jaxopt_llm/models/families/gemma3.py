"""Gemma 3, text (arXiv:2503.19786): qk-norm, five local layers to one global, a rope for each."""

import re
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families.gemma2 import gemma_keys, gemma_settings
from jaxopt_llm.models.family import QK_NORMS, SANDWICH_NORMS, Family, HFConfig, decoder_names

# What transformers assumes of a multimodal checkpoint's `text_config`, which the hub's files leave out.
TEXT_DEFAULTS = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _read(hf: HFConfig) -> ModelConfig:
    hf.expect("use_bidirectional_attention", False)
    period = hf.count("sliding_window_pattern", 6)
    period = hf.count("_sliding_window_pattern", period)
    local_theta = hf.number("rope_local_base_freq", 10000.0)
    context = hf.count("max_position_embeddings")
    full = hf.rope(context, theta=1e6, layer_type="full_attention")
    local = HFConfig({"rope_parameters": hf.table("rope_parameters")})
    return hf.decoder(
        "gemma3_text",
        windows=hf.windows(lambda i: (i + 1) % period != 0, hf.count("sliding_window", 4096)),
        rope=full,
        rope_local=local.rope(context, theta=local_theta, layer_type="sliding_attention"),
        qk_norm="head",
        **gemma_settings(hf),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    assert config.rope_local
    return gemma_keys(config) | {"rope_local_base_freq": config.rope_local.theta}


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(**QK_NORMS, **SANDWICH_NORMS),
    towers=("vision_tower", "multi_modal_projector"),
)
