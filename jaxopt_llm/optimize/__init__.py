"""Floor 7: the main job. A model through a recipe, and what that cost."""

from jaxopt_llm.optimize.job import Outcome, Report, optimize, sample_text
from jaxopt_llm.optimize.recipe import Measure, Quantize, Recipe, Step

__all__ = ["Measure", "Outcome", "Quantize", "Recipe", "Report", "Step", "optimize", "sample_text"]
