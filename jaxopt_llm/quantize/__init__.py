"""Floor 6: float weights to quantized ones."""

from jaxopt_llm.quantize.mixed import MIXED, allocate, mixed
from jaxopt_llm.quantize.rtn import quantize
from jaxopt_llm.quantize.rules import Rules, assign, check_rules, exact_rules
from jaxopt_llm.quantize.sensitivity import Losses, sensitivities

__all__ = [
    "MIXED",
    "Losses",
    "Rules",
    "allocate",
    "assign",
    "check_rules",
    "exact_rules",
    "mixed",
    "quantize",
    "sensitivities",
]
