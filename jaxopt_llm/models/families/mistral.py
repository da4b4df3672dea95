"""Mistral 7B (arXiv:2310.06825): llama with a sliding window."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, decoder_names, windows_to_hf


def _read(hf: HFConfig) -> ModelConfig:
    return hf.decoder("mistral", windows=hf.windows(lambda i: True, hf.count("sliding_window", None)))


def _write(config: ModelConfig) -> dict[str, Any]:
    keys = windows_to_hf(config)
    if len(config.window_kinds) == 1:
        del keys["layer_types"]  # with which transformers takes it for a ministral
    return keys


FAMILY = Family(
    name="mistral", architecture="MistralForCausalLM", read=_read, write=_write, names=decoder_names()
)
