"""Floor 0: meshes, axis rules, collectives, processes. Knows nothing of models."""

from jaxopt_llm.sharding.collectives import axis_index, axis_size, is_manual, join_last, psum
from jaxopt_llm.sharding.mesh import MESH_AXES, MeshSpec, split_over
from jaxopt_llm.sharding.rules import RULES, AxisRules, Sharding
from jaxopt_llm.sharding.stages import balanced

__all__ = [
    "MESH_AXES",
    "RULES",
    "AxisRules",
    "MeshSpec",
    "Sharding",
    "axis_index",
    "axis_size",
    "balanced",
    "is_manual",
    "join_last",
    "psum",
    "split_over",
]
