"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783), SmolLM2, TinyLlama."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    bias = hf.flag("attention_bias", False)
    return hf.decoder("llama", qkv_bias=bias, o_bias=bias, mlp_bias=hf.flag("mlp_bias", False))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    names=decoder_names(),
    heads_divide_width=True,
)
