"""A model's weights as a step takes them: packed for the kernels, on one device or on a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxopt_llm.engine.layout import on_each, packing
from jaxopt_llm.engine.program import held
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.models import Transformer, mesh_of
from jaxopt_llm.sharding.hosts import absent


class Placed:
    """The weights of one model, or of one stage of a pipeline.

    Args:
      model: on one device, or placed on a mesh of data, expert and tensor axes.
      consume: delete the model's arrays once they are packed.

    Attributes:
      skeleton, leaves: of the packed model.
      here: whether this process has any of the devices; if not, `leaves` are shapes.
      mesh: that they lie on; None for one device.
      platform: of the devices.

    Raises:
      ValueError: for a mesh that splits another axis.
    """

    def __init__(self, model: Transformer, *, consume: bool):
        self.mesh, self.platform = engine_mesh(model), platform_of(model)
        self._devices = devices_of(model)
        self.here = any(device.process_index == jax.process_index() for device in self._devices)
        self._form, leaves = Skeleton.split(model)
        self._forms = [_Form.of(leaf) for leaf in leaves]
        specs = [form.spec for form in self._forms]
        self._packing = packing(self._form, specs, self.mesh, self.platform)
        self.skeleton, self.leaves = self._pack(leaves)
        if consume and self.here:
            delete(leaves, self.leaves)

    def suits(self, model: Transformer) -> bool:
        """Whether a model has the same parts, shapes and dtypes, and lies where this one does."""
        form, leaves = Skeleton.split(model)
        return form == self._form and [_Form.of(leaf) for leaf in leaves] == self._forms

    def update(self, model: Transformer) -> None:
        """Exchanges the weights for those of a model that suits."""
        _, self.leaves = self._pack(Skeleton.split(model)[1])

    def hold(self, make: Callable[[], Any]) -> Any:
        """What a function makes, on each device where the weights are."""
        if not self.here:
            return self.absent(jax.eval_shape(on_each(self.mesh, make)), held)
        if self.mesh is not None:
            return jax.jit(on_each(self.mesh, make))()
        (device,) = self._devices
        with jax.default_device(device):  # not first on another, which may have no room
            # Committed, as what a step gives may be: else its second call would compile once more.
            return jax.device_put(make(), device)

    def absent(self, shapes: Any, spec: Callable[[Mesh], PartitionSpec]) -> Any:
        """Arrays of these shapes, split like this, of which nothing lies in this process."""
        where = self.where(spec)
        return jax.tree.map(lambda a: absent(a.shape, a.dtype, where), shapes)

    def stack(self, batches: Sequence[Any]) -> Any:
        """What the host has for each data shard, as a step takes it."""
        return batches[0] if self.mesh is None else jax.tree.map(lambda *a: np.stack(a), *batches)

    def where(self, spec: Callable[[Mesh], PartitionSpec]) -> Sharding:
        """What an array split like this lies like beside the weights."""
        if self.mesh is None:
            return SingleDeviceSharding(*self._devices)
        return NamedSharding(self.mesh, spec(self.mesh))

    def _pack(self, leaves: tuple[Array, ...]) -> tuple[Skeleton, tuple[Array, ...]]:
        if not self.here:
            return self._shapes(leaves)
        skeleton, parts = self._packing(leaves)
        if self.mesh is None:
            # Committed, whoever made them: weights that are and weights that are not would each have their programs.
            parts = jax.device_put(parts, *self._devices)
        return skeleton, parts

    def _shapes(self, leaves: tuple[Array, ...]) -> tuple[Skeleton, Any]:
        skeletons = []

        def pack(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
            skeleton, parts = self._packing(leaves)
            skeletons.append(skeleton)
            return parts

        shapes = jax.eval_shape(pack, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaves))
        return skeletons[0], shapes


def delete(leaves: Sequence[Array], kept: Sequence[Array]) -> None:
    """Frees the arrays of a model, but for those that lie where one that is kept lies."""
    place = lambda array: array.addressable_shards[0].data.unsafe_buffer_pointer()
    places = set(map(place, kept))
    for leaf in leaves:
        if place(leaf) not in places:
            leaf.delete()


class _Form(NamedTuple):
    """What must stay as it is when weights are exchanged."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    devices: frozenset[jax.Device]
    spec: PartitionSpec

    @classmethod
    def of(cls, leaf: Array) -> Self:
        return cls(leaf.shape, leaf.dtype, frozenset(leaf.sharding.device_set), spec_of(leaf))


def spec_of(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    """How an array is split, an entry for each dimension."""
    where = leaf.sharding
    spec = where.spec if isinstance(where, NamedSharding) else PartitionSpec()
    return PartitionSpec(*spec, *(None,) * (leaf.ndim - len(spec)))


def platform_of(model: Transformer) -> str:
    """Of the devices that a model lies on."""
    return next(iter(jax.tree.leaves(nnx.state(model))[0].sharding.device_set)).platform


def devices_of(model: Transformer) -> set[jax.Device]:
    """Those that a model lies on, in all its stages."""
    return {device for leaf in jax.tree.leaves(nnx.state(model)) for device in leaf.sharding.device_set}


def engine_mesh(model: Transformer) -> Mesh | None:
    """The mesh that a model lies on, if the engine can use it; None for one device."""
    mesh = mesh_of(model)
    if mesh is None:
        return None
    missing = [axis for axis in ("data", "tensor") if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"the mesh has no axis {' and '.join(missing)}; build it with MeshSpec, which has all"
        )
    if mesh.shape.get("sequence", 1) > 1:
        raise ValueError(
            f"the engine reads one token at a time, and splits no sequence={mesh.shape['sequence']}; leave it at 1"
        )
    return mesh
