"""OLMo 2 (arXiv:2501.00656): norms after attention and feed-forward, queries and keys normalised whole."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import QK_NORMS, Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", False)
    return hf.decoder("olmo2", qkv_bias=bias, o_bias=bias, pre_norm=False, post_norm=True, qk_norm="width")


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias}


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(
        **QK_NORMS,
        attention_post_norm__weight="post_attention_layernorm.weight",
        mlp_post_norm__weight="post_feedforward_layernorm.weight",
    ),
)
