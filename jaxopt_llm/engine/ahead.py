"""The engine's step compiled from shapes alone: to look at what would run, also on devices that are not there."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int32

from jaxopt_llm.engine import inputs
from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.layout import empty_counts, empty_state, on_each, packing
from jaxopt_llm.engine.passes import choose, forward, keep_last, latest
from jaxopt_llm.engine.placed import engine_mesh, spec_of
from jaxopt_llm.engine.program import Inputs, Leaves, Program, Sampled, State, held, packed_over
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.engine.step import step
from jaxopt_llm.models import FUSIONS, Transformer


class Ahead(NamedTuple):
    """A compiled step.

    Attributes:
      compiled: the program.
      weight_bytes, cache_bytes: of its arguments on one device.
    """

    compiled: jax.stages.Compiled
    weight_bytes: int
    cache_bytes: int


class _Case(NamedTuple):
    """What a step is compiled for: its arguments, as shapes, and the device that it asks for."""

    parts: tuple[jax.ShapeDtypeStruct, ...]
    state: State
    batch: Inputs
    program: Program
    device: Any


def compile_step(
    model: Transformer, config: EngineConfig, shape: inputs.Shape, *, fuse: frozenset[str] = FUSIONS
) -> Ahead:
    """What an engine would run for this shape.

    Args:
      model: placed on a mesh of data, expert and tensor axes, or of one device; its parameters may be shapes.
      config: of the engine.
      shape: rows, tokens and steps of the program.
      fuse: as `models.packed` has it; an engine fuses all it can.
    """
    case = _case(model, config, shape, fuse)
    with jax.default_device(case.device):  # which Pallas asks, outside a shard_map
        lowered = step.lower((case.parts, ()), case.state, case.batch, program=case.program)
        compiled = lowered.compile()
    return Ahead(compiled, _bytes(case.parts), _bytes(jax.tree.leaves(case.state.cache)))


def compile_apart(
    model: Transformer, config: EngineConfig, shape: inputs.Shape
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """What would run if sampling were no part of the step: a program that ends in logits, and one that takes them.

    Args:
      model: on one device; its parameters may be shapes.
      config: of the engine.
      shape: of one step, without the optional parts.
    """
    case = _case(model, config, shape, FUSIONS)
    logits = jax.ShapeDtypeStruct(
        (shape.rows, model.config.vocab_size), jnp.float32, sharding=case.state.last_tokens.sharding
    )
    with jax.default_device(case.device):
        first = _logits.lower((case.parts, ()), case.state, case.batch, program=case.program).compile()
        second = _sampled.lower(logits, case.state.last_tokens, case.batch).compile()
    return first, second


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _logits(
    leaves: Leaves, state: State, inputs: Inputs, *, program: Program
) -> tuple[Float[Array, "B V"], State]:
    model = program.skeleton.fill(leaves[0])
    hidden, state = forward(model, None, state, latest(state.last_tokens, inputs), None)
    return model.logits(hidden[jnp.maximum(inputs.query_start[1:] - 1, 0)]), state


@functools.partial(jax.jit, donate_argnames="last_tokens")
def _sampled(
    logits: Float[Array, "B V"], last_tokens: Int32[Array, "R"], inputs: Inputs
) -> tuple[Sampled, State]:
    state = State(cache=(), last_tokens=last_tokens)
    last = jnp.maximum(inputs.query_start[1:] - 1, 0)
    tokens, positions = latest(last_tokens, inputs).tokens[last], inputs.positions[last]
    sampled = choose(logits, tokens, positions, inputs.sampling, state, inputs, ())
    return sampled, keep_last(state, inputs, sampled.tokens, inputs.limit > 0)


def _case(model: Transformer, config: EngineConfig, shape: inputs.Shape, fuse: frozenset[str]) -> _Case:
    sizes = config.scheduler(model.config)
    form, leaves = Skeleton.split(model)
    mesh = engine_mesh(model)
    device: Any = next(iter(leaves[0].sharding.device_set))
    where = lambda spec: SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, spec(mesh))
    pack = packing(form, [spec_of(leaf) for leaf in leaves], mesh, device.platform, fuse)
    skeletons: list[Skeleton] = []

    def packed_leaves(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        skeleton, parts = pack(leaves)
        skeletons.append(skeleton)
        return parts

    parts = _placed(jax.eval_shape(packed_leaves, *leaves), where(packed_over))
    dtype = config.kv_dtype(model.dtype)

    def state_of_one() -> State:
        state = empty_state(model.config, sizes, dtype, mesh, device.platform)
        if not shape.full:
            return state
        seen, counts = empty_counts(model.config, sizes)
        return dataclasses.replace(state, seen=seen, counts=counts)

    state = _placed(jax.eval_shape(on_each(mesh, state_of_one)), where(held))
    widths = inputs.Widths(sizes.max_slots, model.config.vocab_size, 1)
    table = np.zeros(
        (len(sizes.windows), sizes.max_slots, -(-sizes.max_seq_len // sizes.page_size)), np.int32
    )
    batch = inputs.idle(shape, widths, table)
    if mesh is not None:
        batch = jax.tree.map(lambda a: np.stack([a] * mesh.shape["data"]), batch)
    program = Program(skeleton=skeletons[0], steps=shape.steps, full=shape.full, mesh=mesh)
    return _Case(parts, state, batch, program, device)


def _placed(shapes: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)


def _bytes(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    """On one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
