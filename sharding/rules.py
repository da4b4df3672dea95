"""From logical axes to mesh axes: the only place that decides it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_llm.sharding.mesh import check_mesh
from jaxopt_llm.sharding.stages import check_stages, stage_mesh

# Why a mesh axis may have nothing to split.
_IDLE = {
    "stage": "the model has no layers",
    "expert": "the model has no experts",
}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Which mesh axis each logical axis is split over.

    Attributes:
      mesh_axes: logical axis -> mesh axis, or None for an axis that is never split.
      replicated_if_uneven: logical axes that stay whole where the mesh axis does not divide them
        (fewer KV heads than tensor shards, an odd vocabulary). Any other such axis is an error.
    """

    mesh_axes: Mapping[str, str | None]
    replicated_if_uneven: frozenset[str] = frozenset()

    def mesh_axis(self, logical: str, size: int, mesh: Mesh | AbstractMesh, what: str) -> str | None:
        """The mesh axis that splits `size` units of a logical axis of the array named `what`."""
        if logical not in self.mesh_axes:
            raise ValueError(
                f"{what}: no rule for logical axis {logical!r}; rules are {dict(self.mesh_axes)}"
            )
        axis = self.mesh_axes[logical]
        shards = mesh.shape.get(axis, 1) if axis else 1
        if axis is None or shards == 1:
            return None
        if size % shards == 0:
            return axis
        if logical in self.replicated_if_uneven:
            return None
        divisors = [d for d in range(2, size + 1) if size % d == 0][:8]
        raise ValueError(
            f"{what}: mesh {axis}={shards} does not divide {logical}={size}; {axis} may be {divisors}"
        )


RULES = AxisRules(
    mesh_axes={
        "batch": "data",
        "tokens": "sequence",
        "layers": "stage",
        "experts": "expert",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "expert_mlp": "tensor",
        "vocab": "tensor",
        "embed": None,
        "head_dim": None,
    },
    replicated_if_uneven=frozenset({"kv_heads", "vocab"}),
)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh, the rules, and how many units each logical axis of the model has.

    The mesh may be abstract: enough to tell shapes, where its devices are not there.

    An axis is split by whole units: `heads` of width `head_dim` are never cut, so `units["heads"]` is
    the number of heads, whatever the length of the array's dimension. `batch` and `tokens` are the caller's to
    split.

    `layers` are no dimension of an array: each lies in one stage, whose part of the mesh `of_stage` gives.

    Attributes:
      mesh, units, rules: as above.
      stage_layers: how many layers each stage of a pipeline has; None for about as many each.

    Raises:
      ValueError: for a mesh with other axes than ours, axes that are not `Auto`, or one of more than one device
        that nothing of this model would be split over.
    """

    mesh: Mesh | AbstractMesh
    units: Mapping[str, int]
    rules: AxisRules = RULES
    stage_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        check_mesh(self.mesh)
        used = {self.rules.mesh_axes.get(logical) for logical in ("batch", "tokens", *self.units)}
        for axis, size in self.mesh.shape.items():
            if size > 1 and axis not in used:
                reason = _IDLE.get(axis, "the model has nothing on it")
                raise ValueError(f"mesh {axis}={size} would split nothing: {reason}; leave {axis} at 1")
        layers, stages = self.units.get("layers", 1), self.mesh.shape.get("stage", 1)
        check_stages(layers, stages)
        own = self.stage_layers
        if own is not None and (len(own) != stages or sum(own) != layers or min(own) < 1):
            raise ValueError(
                f"mesh stage={'+'.join(map(str, own))} must be {stages} numbers of at least 1 that add up to the "
                f"model's {layers} layers"
            )

    @property
    def stages(self) -> int:
        """Of the pipeline; 1 where there is none."""
        return self.mesh.shape.get("stage", 1)

    def stage_of(self, layer: int) -> int:
        """The stage that a layer lies in."""
        if self.stage_layers is None:
            return layer * self.stages // self.units["layers"]
        ends = itertools.accumulate(self.stage_layers)
        return next(stage for stage, end in enumerate(ends) if layer < end)

    def of_stage(self, stage: int) -> "Sharding":
        """The same on the devices of one stage."""
        if self.stages == 1:
            return self
        units = {axis: count for axis, count in self.units.items() if axis != "layers"}
        return Sharding(stage_mesh(self.mesh, stage), units, self.rules)

    def spec(self, axes: Sequence[str | None], what: str = "array") -> P:
        """The partition of an array whose dimensions have these logical axes (None: never split).

        Raises:
          ValueError: if an axis has no rule, does not divide, or two axes would take one mesh axis.
        """
        names = [self._mesh_axis(axis, what) for axis in axes]
        split = [name for name in names if name]
        if len(split) != len(set(split)):
            raise ValueError(f"{what}: logical axes {tuple(axes)} would put {split} on one array twice")
        return P(*names)

    def _mesh_axis(self, logical: str | None, what: str) -> str | None:
        if logical is None:
            return None
        # An axis that the model does not count (batch) is the caller's to keep even.
        size = self.units.get(logical, 0)
        return self.rules.mesh_axis(logical, size, self.mesh, what)

    def named(self, axes: Sequence[str | None], what: str = "array") -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, what))
