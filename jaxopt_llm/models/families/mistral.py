"""Mistral 7B (arXiv:2310.06825): llama with a sliding window."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, decoder_names


def _read(hf: HFConfig) -> ModelConfig:
    return hf.decoder("mistral", windows=hf.windows(lambda i: True, hf.count("sliding_window", None)))


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.windows[0]}


FAMILY = Family(
    name="mistral", architecture="MistralForCausalLM", read=_read, write=_write, names=decoder_names()
)
