"""What the engine has on the device: parameters, state and programs, on one device or on a mesh.

On a mesh the whole step is the body of one `shard_map`: kernels see local arrays, and the model asks for each sum over
the tensor axis itself. Data shards each have slots and pages of their own, and inputs with one more leading dimension.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_llm.engine.layout import empty_counts, empty_state, on_each, packing
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.engine.step import Inputs, Out, Processor, Program, Skeleton, step
from jaxopt_llm.models import Transformer


class Runner:
    """Runs steps.

    Args:
      model: on one device, or placed on a mesh of data and tensor axes.
      sizes: slots and pages of each data shard.
      cache_dtype: of keys and values.
      processors: as `Program` has them.
      consume: delete the model's arrays once they are packed.

    Raises:
      ValueError: for a mesh that splits another axis.
    """

    def __init__(
        self,
        model: Transformer,
        sizes: SchedulerConfig,
        cache_dtype: jnp.dtype,
        processors: Sequence[Processor] = (),
        *,
        consume: bool = False,
    ):
        self._model_config, self._sizes = model.config, sizes
        self._processors = tuple(processors)
        self._form, leaves = Skeleton.split(model)
        self._mesh = mesh_of(leaves)
        self._placed = [_Form.of(leaf) for leaf in leaves]
        platform = next(iter(leaves[0].devices())).platform
        state = functools.partial(empty_state, model.config, sizes, cache_dtype, self._mesh, platform)
        jax.eval_shape(on_each(self._mesh, state))  # what cannot be raises here, while the model is whole
        self._pack = packing(self._form, [form.spec for form in self._placed], self._mesh, platform)
        self._skeleton, self._leaves = self._pack(leaves)
        if consume:
            _delete(leaves, self._leaves)
        self._state = self._on_device(state)
        self._counts: tuple[Any, Any] = (None, None)  # seen and counts, which only full programs take

    @property
    def shards(self) -> int:
        """Data shards: how many inputs a step takes."""
        return self._mesh.shape["data"] if self._mesh else 1

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the pages of all layers take for a token, over all tensor shards: scales and padding too."""
        config, sizes = self._model_config, self._sizes
        return sum(
            leaf.nbytes // (self.shards * sizes.num_pages[config.kind(layer)] * sizes.page_size)
            for layer, pages in enumerate(self._state.cache)
            for leaf in jax.tree.leaves(pages)
        )

    def run(self, batches: Sequence[Inputs], *, steps: int, full: bool) -> Out:
        """One dispatch.

        Args:
          batches: of equal shapes, one for each data shard.
          steps, full: as `Program` has them.

        Returns:
          what it gives, for `read`; not waited for.
        """
        program = Program(
            skeleton=self._skeleton, steps=steps, full=full, processors=self._processors, mesh=self._mesh
        )
        state = self._state
        if full:
            seen, counts = self._no_counts() if self._counts[0] is None else self._counts
            state = dataclasses.replace(state, seen=seen, counts=counts)
        batch = batches[0] if self._mesh is None else jax.tree.map(lambda *a: np.stack(a), *batches)
        out, state = step(self._leaves, state, batch, program=program)
        if full:
            self._counts = state.seen, state.counts
        self._state = dataclasses.replace(state, seen=None, counts=None)
        return out

    def read(self, out: Out, *, whole: bool) -> list[Out]:
        """Waits for what a dispatch gave, and fetches it for each data shard; unless `whole`, only what was sampled."""
        fetched = jax.device_get(out if whole else Out(sampled=out.sampled))
        if self._mesh is None:
            return [fetched]
        return [jax.tree.map(lambda a, i=i: a[i], fetched) for i in range(self.shards)]

    def update(self, model: Transformer) -> None:
        """Exchanges the parameters for others of the same form.

        Raises:
          ValueError: if the model has other parts, shapes or dtypes, or lies elsewhere.
        """
        form, leaves = Skeleton.split(model)
        if form != self._form or [_Form.of(leaf) for leaf in leaves] != self._placed:
            raise ValueError(
                "the model has other parts, shapes, dtypes or devices than the engine was made for"
            )
        _, self._leaves = self._pack(leaves)

    def _no_counts(self) -> tuple[Array, Array]:
        return self._on_device(functools.partial(empty_counts, self._model_config, self._sizes))

    def _on_device(self, make: Callable[[], Any]) -> Any:
        """What a function makes, on each device where its parameters are."""
        if self._mesh is not None:
            return jax.jit(on_each(self._mesh, make))()
        # Committed, as what a step gives may be: else its second call would compile once more.
        return jax.device_put(make(), *self._leaves[0].devices())


def _delete(leaves: Sequence[Array], kept: Sequence[Array]) -> None:
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


def mesh_of(leaves: Sequence[Any]) -> Mesh | None:
    """The mesh that a model's parameters lie on; None for one device."""
    placed = [leaf.sharding for leaf in leaves]
    if all(len(where.device_set) == 1 for where in placed):
        return None
    if not all(isinstance(where, NamedSharding) for where in placed):
        raise ValueError("the model is spread over devices without a mesh; load it with mesh=")
    mesh = placed[0].mesh
    missing = [axis for axis in ("data", "tensor") if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"the mesh has no axis {' and '.join(missing)}; build it with MeshSpec, which has all"
        )
    others = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in ("data", "tensor")}
    if others:
        raise ValueError(
            f"the engine splits over data and tensor, not over {others}; take a mesh of those axes"
        )
    return mesh
