"""Gemma 2 (arXiv:2408.00118): soft-caps, norms on both sides, every other layer local."""

import math
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import (
    SANDWICH_NORMS,
    Family,
    HFConfig,
    activation_to_hf,
    decoder_names,
    windows_to_hf,
)


def gemma_settings(hf: HFConfig) -> dict[str, Any]:
    """What all Gemmas share."""
    bias = hf.flag("attention_bias", False)
    name = hf.take("hidden_act", "gelu_pytorch_tanh")
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "activation": hf.activation(hf.take("hidden_activation", name)),
        "norm_offset": 1.0,
        "post_norm": True,
        "query_scale": hf.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": hf.number("attn_logit_softcapping", None),
        "logit_softcap": hf.number("final_logit_softcapping", None),
        "scale_embedding": True,
        "tied": hf.flag("tie_word_embeddings", True),
    }


def gemma_keys(config: ModelConfig) -> dict[str, Any]:
    """`gemma_settings` back."""
    scalar = (config.query_scale or config.head_dim**-0.5) ** -2
    whole = round(scalar)  # transformers wants an int
    return windows_to_hf(config) | {
        "attention_bias": config.o_bias,
        "hidden_activation": activation_to_hf(config),
        "query_pre_attn_scalar": whole if math.isclose(whole, scalar, rel_tol=1e-9) else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read(hf: HFConfig) -> ModelConfig:
    windows = hf.windows(lambda i: i % 2 == 0, hf.count("sliding_window", 4096))
    return hf.decoder("gemma2", windows=windows, **gemma_settings(hf))


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read,
    write=gemma_keys,
    names=decoder_names(**SANDWICH_NORMS),
    heads_divide_width=True,
)
