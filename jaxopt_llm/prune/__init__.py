"""Floor 6: models to smaller ones, and weights to zeros."""

from jaxopt_llm.prune.importance import Depth, Importance, choose, importance
from jaxopt_llm.prune.layerwise import CALIBRATED, SparseMethod, sparsify
from jaxopt_llm.prune.reconstruct import reconstruct
from jaxopt_llm.prune.shapes import Axis, Shape, body_params, fit
from jaxopt_llm.prune.sparsity import Sparsity
from jaxopt_llm.prune.surgery import Kept, cut

__all__ = [
    "CALIBRATED",
    "Axis",
    "Depth",
    "Importance",
    "Kept",
    "Shape",
    "SparseMethod",
    "Sparsity",
    "body_params",
    "choose",
    "cut",
    "fit",
    "importance",
    "reconstruct",
    "sparsify",
]
