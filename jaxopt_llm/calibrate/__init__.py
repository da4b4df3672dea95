"""Floor 5: what the products of a model see, layer by layer, and a walk that changes each layer in its turn."""

from jaxopt_llm.calibrate.factor import MOST_DAMPING, inverse_factor
from jaxopt_llm.calibrate.method import LayerWeights, Method
from jaxopt_llm.calibrate.statistics import INPUTS, Statistics, Wants, inputs
from jaxopt_llm.calibrate.text import calibration_ids, continued
from jaxopt_llm.calibrate.walk import layer_weights, walk

__all__ = [
    "INPUTS",
    "MOST_DAMPING",
    "LayerWeights",
    "Method",
    "Statistics",
    "Wants",
    "calibration_ids",
    "continued",
    "inputs",
    "inverse_factor",
    "layer_weights",
    "walk",
]
