"""The families that can be read, one thin file each."""

from collections.abc import Mapping
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families import (
    gemma2,
    gemma3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen3,
    qwen3_moe,
)
from jaxopt_llm.models.family import Family

_MODULES = (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, gpt_oss, olmo2)
FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def family(name: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: if it is unknown; the message lists the known.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model_type {name!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def parse_config(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the contents of a `config.json`, multimodal wrappers around a text model included."""
    if values.get("model_type") == "gemma3" and "text_config" in values:
        outer = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in values}
        values = {"model_type": "gemma3_text"} | outer | values["text_config"]
    return family(str(values.get("model_type"))).parse(values)
