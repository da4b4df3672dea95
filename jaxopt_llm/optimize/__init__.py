"""Floor 7: the main job. A model through a recipe, and what that cost."""

from jaxopt_llm.optimize.context import Calibration, Context
from jaxopt_llm.optimize.distilling import Distill
from jaxopt_llm.optimize.job import Outcome, Report, optimize, sample_text
from jaxopt_llm.optimize.kept import StepReport
from jaxopt_llm.optimize.mixing import Mixed
from jaxopt_llm.optimize.pruning import Prune, Sparsify
from jaxopt_llm.optimize.recipe import Measure, Quantize, Recipe, Step
from jaxopt_llm.optimize.rounding import Layerwise

__all__ = [
    "Calibration",
    "Context",
    "Distill",
    "Layerwise",
    "Measure",
    "Mixed",
    "Outcome",
    "Prune",
    "Quantize",
    "Recipe",
    "Report",
    "Sparsify",
    "Step",
    "StepReport",
    "optimize",
    "sample_text",
]
