"""The programs that the generator runs: prefill of whole prompts, and several decode steps a dispatch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxopt_llm.engine.sampling import SlotSampling, penalize, sample
from jaxopt_llm.models import Batch, Cache, Transformer, init_cache

PAGE_SIZE = 16
Processor = Callable[[Float[Array, "R V"], Int[Array, "R"], Int[Array, "R"]], Float[Array, "R V"]]


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

    def fill(self, leaves: tuple[Array, ...]) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, leaves))


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program is compiled for, beside the shapes of its arguments.

    Attributes:
      skeleton: the model without its parameters.
      pages: pages of each slot.
      penalties: keep track of tokens seen.
      logprobs: how many of the best tokens to report, or None.
      processors: functions `(logits [R, V], last tokens [R], positions [R]) -> logits`.
    """

    skeleton: Skeleton
    pages: int
    penalties: bool
    logprobs: int | None
    processors: tuple[Processor, ...]

    def page_table(self, rows: int, kinds: int) -> Int[Array, "G R P"]:
        """Each slot has pages of its own, the same for every kind of attention."""
        table = jnp.arange(rows * self.pages, dtype=jnp.int32).reshape(rows, self.pages)
        return jnp.broadcast_to(table, (kinds, rows, self.pages))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What decoding carries from step to step.

    Attributes:
      cache: pages of every layer.
      tokens: the latest of each slot, not yet in the cache.
      positions: where those go.
      seen, counts: tokens of the prompt, times generated; None without penalties.
    """

    cache: Cache
    tokens: Int[Array, "R"]
    positions: Int[Array, "R"]
    seen: Bool[Array, "R V"] | None
    counts: Int[Array, "R V"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Out:
    """Chosen tokens and, if asked for, their log-probabilities and the best tokens'."""

    tokens: Int[Array, "*n R"]
    logprob: Float[Array, "*n R"] | None
    top_ids: Int[Array, "*n R k"] | None
    top_logprobs: Float[Array, "*n R k"] | None


@functools.partial(jax.jit, static_argnames="program")
def prefill(
    leaves: tuple[Array, ...],
    tokens: Int[Array, "R T"],
    lengths: Int[Array, "R"],
    slots: SlotSampling,
    *,
    program: Program,
) -> tuple[Out, State]:
    """Whole prompts in, the first token of each out."""
    model = program.skeleton.fill(leaves)
    rows, config = tokens.shape[0], model.config
    cache = init_cache(config, rows * program.pages, PAGE_SIZE, model.dtype)
    batch = Batch.dense(tokens, lengths, program.page_table(rows, len(config.window_kinds)))
    hidden, cache = model.forward(batch, cache)
    last = jnp.maximum(lengths - 1, 0)
    hidden = hidden.reshape(*tokens.shape, -1)[jnp.arange(rows), last]
    seen = counts = None
    if program.penalties:
        empty = jnp.zeros((rows, config.vocab_size), bool)
        real = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
        seen = empty.at[jnp.arange(rows)[:, None], tokens].max(real)
        counts = jnp.zeros((rows, config.vocab_size), jnp.int32)
    previous = tokens[jnp.arange(rows), last]
    before = State(cache=cache, tokens=previous, positions=last, seen=seen, counts=counts)
    return _choose(model, hidden, before, slots, program)


@functools.partial(jax.jit, static_argnames=("program", "steps"), donate_argnames="state")
def decode(
    leaves: tuple[Array, ...],
    state: State,
    slots: SlotSampling,
    stop_ids: Int[Array, "R S"],
    left: Int[Array, "R"],
    *,
    program: Program,
    steps: int,
) -> tuple[Out, State]:
    """Up to `steps` tokens a slot; ends early when every slot is through.

    Args:
      leaves: parameters.
      state: donated.
      slots: settings.
      stop_ids: tokens that end a slot, padded with -1.
      left: tokens that each slot may still give; 0 for a slot that is through.
      program, steps: static.

    Returns:
      tokens `[steps, R]` (what follows a slot's end means nothing), and the state.
    """
    model = program.skeleton.fill(leaves)
    table = program.page_table(left.shape[0], len(model.config.window_kinds))

    def step(state: State) -> tuple[Out, State]:
        hidden, cache = model.forward(Batch.decode(state.tokens, state.positions, table), state.cache)
        return _choose(model, hidden, dataclasses.replace(state, cache=cache), slots, program)

    def more(carry: tuple[Array, Array, Out, State]) -> Array:
        i, left, _, _ = carry
        return (i < steps) & jnp.any(left > 0)

    def advance(carry: tuple[Array, Array, Out, State]) -> tuple[Array, Array, Out, State]:
        i, left, outs, state = carry
        out, state = step(state)
        outs = jax.tree.map(lambda store, new: store.at[i].set(new), outs, out)
        ended = jnp.any(out.tokens[:, None] == stop_ids, axis=1)
        return i + 1, jnp.where(ended, 0, jnp.maximum(left - 1, 0)), outs, state

    shape, _ = jax.eval_shape(step, state)
    outs = jax.tree.map(lambda a: jnp.zeros((steps, *a.shape), a.dtype), shape)
    _, _, outs, state = jax.lax.while_loop(more, advance, (jnp.asarray(0), left, outs, state))
    return outs, state


def _choose(
    model: Transformer, hidden: Float[Array, "R D"], state: State, slots: SlotSampling, program: Program
) -> tuple[Out, State]:
    """The next token of each slot from its last hidden state; positions move on by one."""
    raw = logits = model.logits(hidden)
    if state.seen is not None and state.counts is not None:
        logits = penalize(logits, state.seen, state.counts, slots)
    for processor in program.processors:
        logits = processor(logits, state.tokens, state.positions)
    tokens = sample(logits, slots, state.positions)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(tokens.shape[0]), tokens].add(1)
    after = dataclasses.replace(state, tokens=tokens, positions=state.positions + 1, counts=counts)
    return _report(raw, tokens, program.logprobs), after


def _report(logits: Float[Array, "R V"], tokens: Int[Array, "R"], logprobs: int | None) -> Out:
    if logprobs is None:
        return Out(tokens=tokens, logprob=None, top_ids=None, top_logprobs=None)
    values = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(values, max(logprobs, 1))
    chosen = jnp.take_along_axis(values, tokens[:, None], axis=1)[:, 0]
    return Out(tokens=tokens, logprob=chosen, top_ids=ids.astype(jnp.int32), top_logprobs=top)
