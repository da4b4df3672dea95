"""The program that the engine runs: one step over a flat ragged batch, or several of decoding in one dispatch.

Letters: T tokens of a step, B rows (sequences) of a step, R slots of the engine, S stop tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from jaxopt_llm.engine.sampling import TOP, RowSampling, penalize, sample
from jaxopt_llm.models import Batch, Cache, Transformer

HELD = P(("data", "tensor"))  # how the state lies on a mesh: each device's part is its own
PACKED = P("tensor")  # and the parameters: the data shards have the same
_ROWS_OF_LOGITS = 64  # scored at once, so that no [T, V] ever exists

Processor = Callable[[Float[Array, "B V"], Int[Array, "B"], Int[Array, "B"]], Float[Array, "B V"]]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its parameters. Its hash takes milliseconds, so it is computed once.

    Attributes:
      graph: the modules.
      treedef: how flat parameters go back into them.
    """

    graph: nnx.GraphDef
    treedef: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.graph, self.treedef)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @classmethod
    def split(cls, model: Transformer) -> tuple["Skeleton", tuple[Array, ...]]:
        """A model as its skeleton and its parameters as flat leaves."""
        graph, params = nnx.split(model)
        leaves, treedef = jax.tree.flatten(params)
        return cls(graph, treedef), tuple(leaves)

    def fill(self, leaves: tuple[Array, ...]) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, leaves))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What stays on the device between steps.

    Attributes:
      cache: pages of every layer.
      last_tokens: the latest sampled in each slot, not yet in the cache.
      seen: tokens of each slot's prompt, for penalties.
      counts: how often each token was generated in each slot. Only the full program takes `seen` and `counts`.
    """

    cache: Cache
    last_tokens: Int32[Array, "R"]
    seen: Bool[Array, "R V"] | None = None
    counts: Int32[Array, "R V"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the host decides for one dispatch: NumPy arrays outside, JAX arrays inside. Rows are the sequences that take
    part, in any order.

    Attributes:
      tokens: `[T]`; -1 stands for the latest token of the row's slot.
      positions: `[T]`.
      rows: `[T]`, the row of each token; B for padding.
      slots: `[B]`, the slot of each row; R for padding.
      kv_len: `[B]`, tokens of each row once this step is over.
      query_start: `[B+1]`, where the tokens of each row start.
      num_rows: rows in use.
      page_table: `[G, B, P]`.
      limit: `[B]`, tokens that may come of each row: 0 where its prompt goes on, 1, or the steps it takes part in.
      stop_ids: `[B, S]`, tokens that end a row, padded with -1.
      sampling: settings.
      extras: what only the full program reads, else None.
    """

    tokens: Int32[Any, "T"]
    positions: Int32[Any, "T"]
    rows: Int32[Any, "T"]
    slots: Int32[Any, "B"]
    kv_len: Int32[Any, "B"]
    query_start: Int32[Any, "B1"]
    num_rows: Int32[Any, ""]
    page_table: Int32[Any, "G B P"]
    limit: Int32[Any, "B"]
    stop_ids: Int32[Any, "B S"]
    sampling: RowSampling
    extras: "Extras | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Extras:
    """The optional parts of a dispatch.

    Attributes:
      fresh: `[B]`, rows whose slot starts anew: nothing was seen there.
      prompt_len: `[B]`; tokens from there on count as generated.
      bias_ids, bias: `[B, MOST_BIASES]`, tokens whose scores are shifted, -1 for none, and by how much.
      mask: `[B, ceil(V/32)]`, a bit for each token that may come next, lowest first.
      targets: `[T]`, tokens whose log-probabilities after each position are wanted, -1 for none.
      logprobs: whether any row wants the log-probabilities of what it samples.
    """

    fresh: Bool[Any, "B"]
    prompt_len: Int32[Any, "B"]
    bias_ids: Int32[Any, "B most"]
    bias: Float[Any, "B most"]
    mask: UInt32[Any, "B words"]
    targets: Int32[Any, "T"]
    logprobs: Bool[Any, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """What one step of sampling gives each row; the last three only in the full program.

    Attributes:
      tokens: chosen.
      finite: whether all the model's scores were numbers.
      logprob: of the chosen tokens under the model's own distribution.
      top_ids, top_logprobs: of the TOP best tokens.
    """

    tokens: Int32[Any, "*n B"]
    finite: Bool[Any, "*n B"]
    logprob: Float[Any, "*n B"] | None = None
    top_ids: Int32[Any, "*n B top"] | None = None
    top_logprobs: Float[Any, "*n B top"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Out:
    """What a dispatch gives: on a mesh with a leading dimension, the data shard.

    Attributes:
      sampled: `[steps, B]`; what follows a row's end means nothing.
      target_logprob: `[T]`, of `Extras.targets`.
      best: `[T]`, the likeliest token after each position whose target is wanted.
      hidden: `[T, D]`, after the final norm.
    """

    sampled: Sampled
    target_logprob: Float[Any, "*n T"] | None = None
    best: Int32[Any, "*n T"] | None = None
    hidden: Float[Any, "*n T D"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a step is compiled for, beside the shapes of its arguments.

    Attributes:
      skeleton: the model without its parameters.
      steps: of decoding, at most; 1 for a step that may hold prompts.
      full: with every optional part.
      processors: functions `(logits [B, V], last tokens [B], positions [B]) -> logits`, before sampling.
      mesh: of data and tensor axes, or None for one device.
    """

    skeleton: Skeleton
    steps: int
    full: bool
    processors: tuple[Processor, ...] = ()
    mesh: Mesh | None = None


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def step(leaves: tuple[Array, ...], state: State, inputs: Inputs, *, program: Program) -> tuple[Out, State]:
    """One dispatch. With `program.steps` above 1 every row decodes, and takes part in its first `limit` steps.

    Args:
      leaves: parameters.
      state: donated.
      inputs: what the host decides; on a mesh with a leading dimension, the data shard.
      program: static.
    """
    if program.mesh is None:
        return _step(leaves, state, inputs, program)

    def body(leaves: tuple[Array, ...], state: State, inputs: Inputs) -> tuple[Out, State]:
        out, state = _step(leaves, state, jax.tree.map(lambda a: a[0], inputs), program)
        return jax.tree.map(lambda a: a[None], out), state

    return jax.shard_map(
        body,
        mesh=program.mesh,
        in_specs=(PACKED, HELD, P("data")),
        out_specs=(P("data"), HELD),
        check_vma=False,  # every tensor shard samples the same, which JAX cannot know
    )(leaves, state, inputs)


def _step(leaves: tuple[Array, ...], state: State, inputs: Inputs, program: Program) -> tuple[Out, State]:
    model = program.skeleton.fill(leaves)
    tokens = jnp.where(inputs.tokens < 0, _of_rows(state.last_tokens, inputs)[inputs.rows], inputs.tokens)
    if program.steps > 1:
        return _decode(model, state, inputs, tokens, program)
    hidden, state = _forward(model, state, inputs, tokens)
    last = jnp.maximum(inputs.query_start[1:] - 1, 0)
    sampled, state = _sample(
        model, hidden[last], tokens[last], inputs.positions[last], state, inputs, program
    )
    sampled = jax.tree.map(lambda a: a[None], sampled)
    if inputs.extras is None:
        return Out(sampled=sampled), state
    logprob, best = _score(model, hidden, inputs.extras.targets)
    return Out(sampled=sampled, target_logprob=logprob, best=best, hidden=hidden), state


def _decode(
    model: Transformer, state: State, inputs: Inputs, tokens: Int32[Array, "B"], program: Program
) -> tuple[Out, State]:
    """Steps of one token a row, until every row is through."""

    def once(i: Array, left: Array, tokens: Array, state: State) -> tuple[Sampled, State]:
        active = left > 0
        now = dataclasses.replace(
            inputs,
            positions=inputs.positions + i,
            kv_len=inputs.kv_len + i,
            rows=jnp.where(active, inputs.rows, left.shape[0]),
            limit=left,
        )
        hidden, state = _forward(model, state, now, tokens)
        return _sample(model, hidden, tokens, now.positions, state, now, program)

    def more(carry: Any) -> Array:
        i, left, *_ = carry
        return (i < program.steps) & jnp.any(left > 0)

    def advance(carry: Any) -> Any:
        i, left, tokens, state, outs = carry
        sampled, state = once(i, left, tokens, state)
        outs = jax.tree.map(lambda store, new: store.at[i].set(new), outs, sampled)
        ended = jnp.any(sampled.tokens[:, None] == inputs.stop_ids, axis=1)
        return i + 1, jnp.where(ended, 0, jnp.maximum(left - 1, 0)), sampled.tokens, state, outs

    zero = jnp.zeros((), jnp.int32)
    # The dispatch before may have ended a row, which the host has not read yet.
    left = jnp.where(jnp.any(tokens[:, None] == inputs.stop_ids, axis=1), 0, inputs.limit)
    shapes, _ = jax.eval_shape(once, zero, left, tokens, state)
    outs = jax.tree.map(lambda a: jnp.zeros((program.steps, *a.shape), a.dtype), shapes)
    _, _, _, state, outs = jax.lax.while_loop(more, advance, (zero, left, tokens, state, outs))
    return Out(sampled=outs), state


def _of_rows(values: Array, inputs: Inputs) -> Array:
    """What the slots of the rows hold."""
    return values.at[inputs.slots].get(mode="fill", fill_value=0)


def _forward(
    model: Transformer, state: State, inputs: Inputs, tokens: Int32[Array, "T"]
) -> tuple[Float[Array, "T D"], State]:
    batch = Batch(
        tokens=tokens,
        positions=inputs.positions,
        slots=inputs.rows,
        kv_len=inputs.kv_len,
        query_start=inputs.query_start,
        num_slots=inputs.num_rows,
        page_table=inputs.page_table,
    )
    hidden, cache = model.forward(batch, state.cache)
    return hidden, dataclasses.replace(_count(state, inputs, tokens), cache=cache)


def _count(state: State, inputs: Inputs, tokens: Int32[Array, "T"]) -> State:
    """Counts the tokens that are fed, so that what is recomputed after a preemption counts as it did before."""
    if inputs.extras is None or state.seen is None or state.counts is None:
        return state
    extras = inputs.extras
    fresh = jnp.zeros(state.seen.shape[0], bool).at[inputs.slots].set(extras.fresh, mode="drop")
    seen = state.seen & ~fresh[:, None]
    counts = jnp.where(fresh[:, None], 0, state.counts)
    slots = inputs.slots.at[inputs.rows].get(mode="fill", fill_value=seen.shape[0])
    generated = inputs.positions >= extras.prompt_len.at[inputs.rows].get(mode="clip")
    seen = seen.at[slots, tokens].max(~generated, mode="drop")
    counts = counts.at[slots, tokens].add(generated.astype(jnp.int32), mode="drop")
    return dataclasses.replace(state, seen=seen, counts=counts)


def _sample(
    model: Transformer,
    hidden: Float[Array, "B D"],
    tokens: Int32[Array, "B"],
    positions: Int32[Array, "B"],
    state: State,
    inputs: Inputs,
    program: Program,
) -> tuple[Sampled, State]:
    """The next token of each row from its last hidden state."""
    raw = logits = model.logits(hidden)
    if inputs.extras is not None:
        logits = _shift(logits, state, inputs)
    for processor in program.processors:
        logits = processor(logits, tokens, positions)
    chosen = sample(logits, inputs.sampling, positions)
    target = jnp.where(inputs.limit > 0, inputs.slots, state.last_tokens.shape[0])
    state = dataclasses.replace(state, last_tokens=state.last_tokens.at[target].set(chosen, mode="drop"))
    sampled = Sampled(tokens=chosen, finite=jnp.all(jnp.isfinite(raw), axis=-1))
    return (sampled if inputs.extras is None else _report(sampled, raw, inputs.extras)), state


def _shift(logits: Float[Array, "B V"], state: State, inputs: Inputs) -> Float[Array, "B V"]:
    """Penalties, biases, and -inf where the mask forbids a token."""
    extras, vocab = inputs.extras, logits.shape[1]
    assert extras is not None and state.seen is not None and state.counts is not None
    seen, counts = _of_rows(state.seen, inputs), _of_rows(state.counts, inputs)
    logits = penalize(logits, seen, counts, inputs.sampling)
    rows = jnp.arange(logits.shape[0])[:, None]
    place = jnp.where(extras.bias_ids < 0, vocab, extras.bias_ids)
    logits = logits.at[rows, place].add(extras.bias, mode="drop")
    ids = jnp.arange(vocab, dtype=jnp.uint32)
    allowed = extras.mask[:, ids // 32] >> (ids % 32)[None, :] & 1
    return jnp.where(allowed > 0, logits, -jnp.inf)


def _report(sampled: Sampled, logits: Float[Array, "B V"], extras: Extras) -> Sampled:
    """Log-probabilities, where a row wants them."""

    def compute() -> tuple[Array, Array, Array]:
        values = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(values, sampled.tokens[:, None], axis=1)[:, 0]
        top, ids = jax.lax.top_k(values, min(TOP, values.shape[1]))
        return chosen, ids.astype(jnp.int32), top

    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))
    logprob, ids, top = jax.lax.cond(extras.logprobs, compute, nothing)
    return dataclasses.replace(sampled, logprob=logprob, top_ids=ids, top_logprobs=top)


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


def pack_mask(allowed: Bool[np.ndarray, "V"]) -> UInt32[np.ndarray, "words"]:
    """A bit for each token, as `Extras.mask` has them."""
    padded = np.pad(allowed, (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)
