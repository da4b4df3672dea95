"""The program that the engine runs: one step over a flat ragged batch, or several of decoding in one dispatch.

Letters: T tokens of a step, B rows (sequences) of a step, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jaxopt_llm.engine.decode import decode
from jaxopt_llm.engine.passes import choose, forward, keep_last, latest
from jaxopt_llm.engine.program import Inputs, Leaves, Out, Program, State, held, packed_over
from jaxopt_llm.models import Transformer
from jaxopt_llm.sharding.hosts import spanned

_ROWS_OF_LOGITS = 64  # scored at once, so that no [T, V] ever exists


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def step(
    leaves: Leaves,
    state: State,
    inputs: Inputs,
    before: Float[Array, "*shards T D"] | None = None,
    *,
    program: Program,
) -> tuple[Out, State]:
    """One dispatch. With `program.steps` above 1 every row decodes, until it has `limit` tokens.

    Args:
      leaves: parameters, of the model and of the draft model if there is one.
      state: donated.
      inputs: what the host decides; on a mesh with a leading dimension, the data shard.
      before: hidden states, for the last stage of a pipeline.
      program: static.
    """
    if program.mesh is None:
        return _step(leaves, state, inputs, before, program)

    shared = joins(program.mesh)
    joined = (lambda a: jax.lax.all_gather(a, "data")) if shared else (lambda a: a[None])

    def body(leaves: Leaves, state: State, inputs: Inputs, before: Array | None) -> tuple[Out, State]:
        inputs, before = jax.tree.map(lambda a: a[0], (inputs, before))
        out, state = _step(leaves, state, inputs, before, program)
        return jax.tree.map(joined, out), state

    return jax.shard_map(
        body,
        mesh=program.mesh,
        in_specs=(packed_over(program.mesh), held(program.mesh), P("data"), P("data")),
        out_specs=(P() if shared else P("data"), held(program.mesh)),
        check_vma=False,  # every tensor shard samples the same, which JAX cannot know
    )(leaves, state, inputs, before)


def joins(mesh: Mesh) -> bool:
    """Whether each data shard gets what all of them gave: every process plans for all, also for those of others."""
    return mesh.shape["data"] > 1 and spanned(mesh.devices.flat) > 1


def _step(
    leaves: Leaves, state: State, inputs: Inputs, before: Float[Array, "T D"] | None, program: Program
) -> tuple[Out, State]:
    model, spec = program.skeleton.fill(leaves[0]), program.speculation
    draft = spec.draft.fill(leaves[1]) if spec and spec.draft else None
    inputs = latest(state.last_tokens, inputs)
    if program.steps > 1:
        return decode(model, draft, state, inputs, program)
    hidden, state = forward(model, draft, state, inputs, spec, before)
    last = jnp.maximum(inputs.query_start[1:] - 1, 0)
    sampled = choose(
        model.logits(hidden[last]), inputs.tokens[last], inputs.positions[last],
        inputs.sampling, state, inputs, program.processors,
    )  # fmt: skip
    state = keep_last(state, inputs, sampled.tokens, inputs.limit > 0)
    sampled = jax.tree.map(lambda a: a[None], sampled)
    if inputs.extras is None:
        return Out(sampled=sampled), state
    logprob, best = _score(model, hidden, inputs.extras.targets)
    return Out(sampled=sampled, target_logprob=logprob, best=best, hidden=hidden), state


def _score(
    model: Transformer, hidden: Float[Array, "T D"], targets: Int32[Array, "T"]
) -> tuple[Float[Array, "T"], Int32[Array, "T"]]:
    """The log-probability of each target, and the likeliest token there, where any is wanted."""

    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        values = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        chosen = jnp.take_along_axis(values, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return chosen, values.argmax(-1).astype(jnp.int32)

    def compute() -> tuple[Array, Array]:
        count = targets.shape[0]
        blocks = -(-count // _ROWS_OF_LOGITS)
        pad = lambda a: jnp.pad(a, ((0, blocks * _ROWS_OF_LOGITS - count),) + ((0, 0),) * (a.ndim - 1))
        cut = lambda a: pad(a).reshape(blocks, _ROWS_OF_LOGITS, *a.shape[1:])
        return jax.tree.map(lambda a: a.reshape(-1)[:count], jax.lax.map(block, (cut(hidden), cut(targets))))

    nothing = lambda: (jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, jnp.int32))
    return jax.lax.cond(jnp.any(targets >= 0), compute, nothing)
