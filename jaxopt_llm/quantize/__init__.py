"""Floor 6: float weights to quantized ones."""

from jaxopt_llm.quantize.awq import AWQ
from jaxopt_llm.quantize.gptq import GPTQ
from jaxopt_llm.quantize.layerwise import layerwise
from jaxopt_llm.quantize.mixed import MIXED, allocate, mixed
from jaxopt_llm.quantize.rtn import quantize
from jaxopt_llm.quantize.rules import Rules, assign, check_rules, exact_rules
from jaxopt_llm.quantize.sensitivity import Losses, sensitivities
from jaxopt_llm.quantize.smoothquant import SmoothQuant

__all__ = [
    "AWQ",
    "GPTQ",
    "MIXED",
    "Losses",
    "Rules",
    "SmoothQuant",
    "allocate",
    "assign",
    "check_rules",
    "exact_rules",
    "layerwise",
    "mixed",
    "quantize",
    "sensitivities",
]
