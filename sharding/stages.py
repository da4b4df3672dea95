"""How the layers of a model fall into the stages of a pipeline, and which devices each stage has."""

import itertools
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh


def balanced(costs: Sequence[float], stages: int, *, last: float = 0.0) -> tuple[int, ...]:
    """How many layers each stage has, so that the slowest is as fast as can be: stages may be uneven.

    Args:
      costs: of each layer, in any unit.
      stages: that there are.
      last: what the last stage has to do beside its layers, in the same unit.

    Raises:
      ValueError: for more stages than layers.
    """
    check_stages(len(costs), stages)
    total = [0.0, *itertools.accumulate(costs)]
    # best[n]: the slowest stage's cost and the stages' sizes, of the first n layers
    best: list[tuple[float, tuple[int, ...]]] = [(total[n], (n,)) for n in range(len(total))]
    for stage in range(2, stages + 1):
        extra = last if stage == stages else 0.0
        best = [
            min(
                (max(best[cut][0], total[n] - total[cut] + extra), (*best[cut][1], n - cut))
                for cut in range(stage - 1, n)
            )
            if n >= stage
            else (total[n], (0,) * stage)
            for n in range(len(total))
        ]
    return best[-1][1]


def check_stages(layers: int, stages: int) -> None:
    """Raises ValueError for more stages than layers."""
    if stages > layers:
        raise ValueError(f"mesh stage={stages} has more stages than the model layers ({layers}); take fewer")


def stage_mesh(mesh: Mesh | AbstractMesh, stage: int) -> Mesh | AbstractMesh:
    """The part of a mesh that one stage of a pipeline has: the same axes, `stage` of size 1."""
    axis = mesh.axis_names.index("stage")
    if isinstance(mesh, AbstractMesh):
        sizes = tuple(1 if i == axis else size for i, size in enumerate(mesh.axis_sizes))
        return AbstractMesh(sizes, mesh.axis_names, axis_types=mesh.axis_types)
    return Mesh(mesh.devices.take([stage], axis=axis), mesh.axis_names, axis_types=mesh.axis_types)
