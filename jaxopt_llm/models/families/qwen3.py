"""Qwen3, dense (arXiv:2505.09388): queries and keys normalised over each head."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families.qwen2 import qwen_windows, write_windows
from jaxopt_llm.models.family import QK_NORMS, Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", False)
    return hf.decoder("qwen3", qk_norm="head", qkv_bias=bias, o_bias=bias, windows=qwen_windows(hf))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias} | write_windows(config)


FAMILY = Family(
    name="qwen3", architecture="Qwen3ForCausalLM", read=_read, write=_write, names=decoder_names(**QK_NORMS)
)
