"""What a device mesh is called and how it is built."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = (
    "data",
    "stage",
    "expert",
    "sequence",
    "tensor",
)  # outermost first: `tensor` gets the fastest links
_AUTO = (AxisType.Auto,) * len(MESH_AXES)  # jax.make_mesh alone gives explicit axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The size of each mesh axis. `MeshSpec.parse("data=2,tensor=4")` is `MeshSpec(data=2, tensor=4)`.

    Attributes:
      data, stage, expert, sequence, tensor: sizes.
      stage_layers: how many layers each stage has; None for as many as take about as long.
    """

    data: int = 1
    stage: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1
    stage_layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.stage_layers and len(self.stage_layers) != self.stage:
            raise ValueError(
                f"stage_layers={self.stage_layers} must have an entry for each of {self.stage} stages"
            )
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"mesh axis {axis}={size!r} must be an integer of at least 1")

    @classmethod
    def parse(cls, text: "str | MeshSpec") -> "MeshSpec":
        """Reads `"data=2,tensor=4"`; axes not named have size 1. `stage=20+12` is two stages of so many layers.

        Raises:
          ValueError: for an unknown or repeated axis, or a size that is no positive integer.
        """
        if isinstance(text, MeshSpec):
            return text
        if text.strip() == "auto":
            raise ValueError("mesh auto is for what loads a model by itself; name axes here, as in tensor=4")
        sizes: dict[str, int] = {}
        stage_layers = None
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, size = (word.strip() for word in item.partition("="))
            if axis not in MESH_AXES:
                raise ValueError(f"unknown mesh axis {axis!r} in {text!r}; axes are {', '.join(MESH_AXES)}")
            if axis in sizes:
                raise ValueError(f"mesh axis {axis!r} is named twice in {text!r}")
            if axis == "stage" and "+" in size and all(part.isdecimal() for part in size.split("+")):
                stage_layers = tuple(map(int, size.split("+")))
                size = str(len(stage_layers))
            if not size.isdecimal():
                raise ValueError(f"mesh axis {item!r} needs a size, as in {axis}=2")
            sizes[axis] = int(size)
        return cls(**sizes, stage_layers=stage_layers)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self._shape)

    def __str__(self) -> str:
        sizes = {axis: str(getattr(self, axis)) for axis in MESH_AXES if getattr(self, axis) > 1}
        if self.stage_layers:
            sizes["stage"] = "+".join(map(str, self.stage_layers))
        named = [f"{axis}={size}" for axis, size in sizes.items()]
        return ",".join(named) or "data=1"

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """A mesh of all five axes over the first `size` devices (default: `jax.devices()`).

        Raises:
          ValueError: if there are fewer devices than the mesh needs.
        """
        available = list(devices if devices is not None else jax.devices())
        if len(available) < self.size:
            raise ValueError(
                f"mesh {self} needs {self.size} devices and there are {len(available)}; "
                "name a smaller mesh, or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=N"
            )
        return jax.make_mesh(self._shape, MESH_AXES, axis_types=_AUTO, devices=available[: self.size])

    def abstract(self) -> AbstractMesh:
        """The mesh without devices: enough to tell what shape each one's part of an array has."""
        return AbstractMesh(self._shape, MESH_AXES, axis_types=_AUTO)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)


def split_over(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """An array whose dimensions are split over these axes, as far as the mesh has them (None: not split)."""
    return NamedSharding(mesh, PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes)))


def check_mesh(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh that our rules cannot use.

    Raises:
      ValueError: for an axis that is none of ours, or one that is not `Auto`: modules leave it to XLA's partitioner
        where products are split.
    """
    unknown = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        raise ValueError(f"unknown mesh axis {unknown[0]!r}; axes are {', '.join(MESH_AXES)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        kinds = ", ".join(kind.name for kind in mesh.axis_types)
        raise ValueError(
            f"the mesh's axes are {kinds} and must be Auto: give jax.make_mesh "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}, or build it with MeshSpec"
        )
