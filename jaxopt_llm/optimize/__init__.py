"""Floor 7: the main job. A model through a recipe, and what that cost."""

from jaxopt_llm.optimize.context import Calibration, Context
from jaxopt_llm.optimize.job import Outcome, Report, optimize, sample_text
from jaxopt_llm.optimize.pruning import Prune, Sparsify
from jaxopt_llm.optimize.recipe import Measure, Quantize, Recipe, Step
from jaxopt_llm.optimize.rounding import Layerwise

__all__ = [
    "Calibration",
    "Context",
    "Layerwise",
    "Measure",
    "Outcome",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Sparsify",
    "Step",
    "optimize",
    "sample_text",
]
