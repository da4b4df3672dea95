"""The engine's step compiled from shapes alone: to look at what would run, also on devices that are not there."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxopt_llm.engine import inputs
from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.layout import empty_counts, empty_state, on_each, packing
from jaxopt_llm.engine.placed import engine_mesh, spec_of
from jaxopt_llm.engine.program import HELD, PACKED, Program, State
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.engine.step import step
from jaxopt_llm.models import Transformer


class Ahead(NamedTuple):
    """A compiled step.

    Attributes:
      compiled: the program.
      weight_bytes, cache_bytes: of its arguments on one device.
    """

    compiled: jax.stages.Compiled
    weight_bytes: int
    cache_bytes: int


def compile_step(model: Transformer, config: EngineConfig, shape: inputs.Shape) -> Ahead:
    """What an engine would run for this shape.

    Args:
      model: placed on a mesh of data and tensor axes, or of one device; its parameters may be shapes.
      config: of the engine.
      shape: rows, tokens and steps of the program.
    """
    sizes = config.scheduler(model.config)
    form, leaves = Skeleton.split(model)
    mesh = engine_mesh(model)
    device: Any = next(iter(leaves[0].sharding.device_set))
    where = lambda spec: SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, spec)
    pack = packing(form, [spec_of(leaf) for leaf in leaves], mesh, device.platform)
    skeletons: list[Skeleton] = []

    def packed_leaves(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        skeleton, parts = pack(leaves)
        skeletons.append(skeleton)
        return parts

    parts = _placed(jax.eval_shape(packed_leaves, *leaves), where(PACKED))
    dtype = config.kv_dtype(model.dtype)

    def state_of_one() -> State:
        state = empty_state(model.config, sizes, dtype, mesh, device.platform)
        if not shape.full:
            return state
        seen, counts = empty_counts(model.config, sizes)
        return dataclasses.replace(state, seen=seen, counts=counts)

    state = _placed(jax.eval_shape(on_each(mesh, state_of_one)), where(HELD))
    widths = inputs.Widths(sizes.max_slots, model.config.vocab_size, 1)
    table = np.zeros(
        (len(sizes.windows), sizes.max_slots, -(-sizes.max_seq_len // sizes.page_size)), np.int32
    )
    batch = inputs.idle(shape, widths, table)
    if mesh is not None:
        batch = jax.tree.map(lambda a: np.stack([a] * mesh.shape["data"]), batch)
    program = Program(skeleton=skeletons[0], steps=shape.steps, full=shape.full, mesh=mesh)
    with jax.default_device(device):  # which Pallas asks, outside a shard_map
        compiled = step.lower((parts, ()), state, batch, program=program).compile()
    return Ahead(compiled, _bytes(parts), _bytes(jax.tree.leaves(state.cache)))


def _placed(shapes: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)


def _bytes(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    """On one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
