"""What a step takes and gives, and what its program is compiled for.

Letters: T tokens of a step, B rows (sequences) of a step, R slots of the engine, S stop tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from jaxopt_llm.engine.sampling import RowSampling
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.engine.speculative import Memory, Speculation, Tally
from jaxopt_llm.models import Cache

Leaves = tuple[tuple[Array, ...], tuple[Array, ...]]
Processor = Callable[[Float[Array, "B V"], Int[Array, "B"], Int[Array, "B"]], Float[Array, "B V"]]


def held(mesh: Mesh) -> P:
    """How the state lies on a mesh: each device's part is its own."""
    return P(tuple(axis for axis in ("data", "expert", "tensor") if axis in mesh.axis_names))


def packed_over(mesh: Mesh) -> P:
    """And the parameters: the data shards have the same."""
    return P(tuple(axis for axis in ("expert", "tensor") if axis in mesh.axis_names))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What stays on the device between steps.

    Attributes:
      cache: pages of every layer.
      last_tokens: the latest sampled in each slot, not yet in the cache.
      seen: tokens of each slot's prompt, for penalties.
      counts: how often each token was generated in each slot. Only the full program takes `seen` and `counts`.
      memory: for speculation.
    """

    cache: Cache
    last_tokens: Int32[Array, "R"]
    seen: Bool[Array, "R V"] | None = None
    counts: Int32[Array, "R V"] | None = None
    memory: Memory | None = None


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
      limit: `[B]`, tokens that may come of each row: 0 where its prompt goes on, 1, or as many as the dispatch's steps.
      stop_ids: `[B, S]`, tokens that end a row, padded with -1.
      drafts: of a row in a round, at most: one of the speculation's levels.
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
    drafts: Int32[Any, ""]
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
      finite: whether all the model's scores were numbers, and those sampled from allowed any token.
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
      rounds: of decoding, those without drafts and those with some.
      tally: how drafts did in it.
    """

    sampled: Sampled
    target_logprob: Float[Any, "*n T"] | None = None
    best: Int32[Any, "*n T"] | None = None
    hidden: Float[Any, "*n T D"] | None = None
    rounds: Int32[Any, "*n 2"] | None = None
    tally: Tally | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a step is compiled for, beside the shapes of its arguments.

    Attributes:
      skeleton: the model without its parameters.
      steps: of decoding, at most; 1 for a step that may hold prompts.
      full: with every optional part.
      processors: functions `(logits [B, V], last tokens [B], positions [B]) -> logits`, before sampling.
      speculation: where drafts come from, or None.
      mesh: of data, expert and tensor axes, or None for one device.
    """

    skeleton: Skeleton
    steps: int
    full: bool
    processors: tuple[Processor, ...] = ()
    speculation: Speculation | None = None
    mesh: Mesh | None = None
