"""Floor 6: float weights to quantized ones."""

from jaxopt_llm.quantize.rtn import quantize

__all__ = ["quantize"]
