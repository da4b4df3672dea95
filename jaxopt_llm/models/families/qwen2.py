"""Qwen2 and Qwen2.5 (arXiv:2407.10671): biased queries, keys and values."""

from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.family import Family, HFConfig, decoder_names, windows_to_hf


def qwen_windows(hf: HFConfig) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide, if `use_sliding_window`."""
    slides, window = hf.flag("use_sliding_window", False), hf.count("sliding_window", None)
    first = hf.count("max_window_layers", 28, least=0)
    return hf.windows(lambda i: i >= first, window if slides else None)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """`qwen_windows` back: `layer_types` name the layers."""
    return {"use_sliding_window": any(config.windows)} | windows_to_hf(config)


def _read(hf: HFConfig) -> ModelConfig:
    return hf.decoder("qwen2", qkv_bias=True, windows=qwen_windows(hf))


FAMILY = Family(
    name="qwen2", architecture="Qwen2ForCausalLM", read=_read, write=write_windows, names=decoder_names()
)
