"""Floor 6: models to smaller ones, and weights to zeros."""

from jaxopt_llm.prune.importance import Depth, Importance, choose, importance
from jaxopt_llm.prune.shapes import Axis, Shape, body_params, fit
from jaxopt_llm.prune.surgery import Kept, cut

__all__ = [
    "Axis",
    "Depth",
    "Importance",
    "Kept",
    "Shape",
    "body_params",
    "choose",
    "cut",
    "fit",
    "importance",
]
