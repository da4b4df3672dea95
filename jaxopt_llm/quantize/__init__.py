"""Floor 6: float weights to quantized ones."""

from jaxopt_llm.quantize.rtn import quantize
from jaxopt_llm.quantize.rules import Rules, assign, check_rules, exact_rules

__all__ = ["Rules", "assign", "check_rules", "exact_rules", "quantize"]
