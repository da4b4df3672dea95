"""From files to devices: rows are read, rounded and placed a piece at a time, shard by shard on a mesh."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding as ArraySharding

from jaxopt_llm.checkpoints.files import aligned
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.checkpoints.offload import Offload
from jaxopt_llm.kernels import Format, QArray, Weight
from jaxopt_llm.models import ParamSpec, shardings
from jaxopt_llm.sharding import Sharding

_CHUNK = 1 << 18  # elements read at once

Leaf = jax.ShapeDtypeStruct
Read = Callable[[int, int], Sequence[np.ndarray]]
Span = tuple[int, int]
Rest = tuple[Span, ...]


def place(
    name: str,
    spec: ParamSpec,
    source: Located,
    *,
    dtype: jnp.dtype,
    rounding: Format | None = None,
    native: bool = False,
    sharding: Sharding | None = None,
    offload: Offload | None = None,
) -> Weight:
    """Reads a parameter to its devices.

    Args:
      name: for messages.
      spec: its shape and logical axes.
      source: where it lies.
      dtype: of float values.
      rounding: quantize to this format while reading.
      native: keep the file's own codes and scales where it has some.
      sharding: a mesh and its rules; None for the default device.
      offload: where it lies on disk, mapped by the default device, a CPU.
    """
    shape = source.shape
    build = functools.partial(_build, name, spec, sharding=sharding, offload=offload)
    if native and source.native and source.form:
        codes, empty = source.native, source.form.shapes(shape)
        return build(empty, lambda a, b: [x for x in codes(a, b) if x is not None])
    if rounding is not None:
        rounding.check(shape[-1], name)
        read = lambda a, b: jax.tree.leaves(rounding.quantize(source.read(a, b, np.float32)))
        return build(rounding.shapes(shape), read)
    return build(Leaf(shape, dtype), lambda a, b: [source.read(a, b, dtype)])


def _build(
    name: str,
    spec: ParamSpec,
    empty: Leaf | QArray,
    read: Read,
    *,
    sharding: Sharding | None,
    offload: Offload | None,
) -> Weight:
    leaves, treedef = jax.tree.flatten(empty)
    if sharding is None:
        buffers = _read_whole(leaves, read, offload.array if offload else aligned)
        arrays = [jax.device_put(buffer) for buffer in buffers]  # on a CPU without a copy
        if offload:
            offload.release()
    else:
        targets = jax.tree.leaves(shardings(spec, empty, sharding, name))
        arrays = _read_shards(leaves, read, targets)
    return jax.tree.unflatten(treedef, arrays)


def _read_whole(
    leaves: Sequence[Leaf], read: Read, allocate: Callable[[Sequence[int], Any], np.ndarray]
) -> list[np.ndarray]:
    buffers = [allocate(leaf.shape, leaf.dtype) for leaf in leaves]
    for first, last in _chunks((0, leaves[0].shape[0]), leaves[0].shape):
        for buffer, part in zip(buffers, read(first, last), strict=True):
            buffer[first:last] = part
    return buffers


def _read_shards(leaves: Sequence[Leaf], read: Read, targets: Sequence[ArraySharding]) -> list[jax.Array]:
    """Each range of rows is read once, cut for every device that holds a part of it, and dropped."""
    wanted = [_indices(leaf.shape, target) for leaf, target in zip(leaves, targets, strict=True)]
    placed: list[list[jax.Array]] = [[] for _ in leaves]
    for rows in sorted({index[0] for index in wanted[0].values()}):
        cuts = [{index[1:] for index in indices.values() if index[0] == rows} for indices in wanted]
        buffers = [
            {cut: aligned(_extent(rows, cut), leaf.dtype) for cut in some}
            for leaf, some in zip(leaves, cuts, strict=True)
        ]
        for first, last in _chunks(rows, leaves[0].shape):
            for store, part in zip(buffers, read(first, last), strict=True):
                for cut, buffer in store.items():
                    buffer[first - rows[0] : last - rows[0]] = part[(slice(None), *(slice(*s) for s in cut))]
        for arrays, indices, store in zip(placed, wanted, buffers, strict=True):
            for device, index in indices.items():
                if index[0] == rows:
                    arrays.append(jax.device_put(store[index[1:]], device))
    return [
        jax.make_array_from_single_device_arrays(leaf.shape, target, arrays, dtype=leaf.dtype)
        for leaf, target, arrays in zip(leaves, targets, placed, strict=True)
    ]


def _indices(shape: tuple[int, ...], target: ArraySharding) -> dict[jax.Device, tuple[Span, ...]]:
    """The part of an array that each of this process's devices holds, as (start, stop) a dimension."""
    spans = lambda index: tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
    return {device: spans(index) for device, index in target.addressable_devices_indices_map(shape).items()}


def _extent(rows: Span, cut: Rest) -> list[int]:
    return [stop - start for start, stop in (rows, *cut)]


def _chunks(rows: Span, shape: tuple[int, ...]) -> list[Span]:
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return [(first, min(first + step, rows[1])) for first in range(rows[0], rows[1], step)]
