"""Speculative decoding (arXiv:2211.17192) inside the step: where drafts come from, and which are accepted.

A dispatch of decoding gives each row a number of tokens that the host fixed; speculation only makes it take fewer
rounds. So the host plans as it does without, and stays one dispatch ahead.

A draft is accepted where it equals the token that the model samples there with the noise of that position
(arXiv:2408.07978, Gumbel coupling). For the point mass that prompt lookup proposes this is rejection sampling itself.
A draft model shares the noise; where it agrees less often than rejection sampling could make it, the tokens are for
that the very ones that the request has without speculation, however many drafts the moment's load allows.

Letters: B rows of a step, M drafts of a row at most, T = B x (1 + M) tokens of a round.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Shaped

from jaxopt_llm.engine.drafting import LONGEST, SHORTEST
from jaxopt_llm.engine.sampling import RowSampling, sample
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.models import Batch, Cache, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """Where drafts come from.

    Attributes:
      kind: of the page tables, the one that reaches back furthest.
      window: how far that is, None for all.
      levels: numbers of drafts that a round has room for, 0 first.
      draft: a smaller model of the same vocabulary; None to look where the latest tokens stood before (prompt lookup).
    """

    kind: int
    window: int | None
    levels: tuple[int, ...]
    draft: Skeleton | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What drafts are made from.

    Attributes:
      ids: `[pages, page_size]`, the tokens whose keys and values the pages of one kind hold; for prompt lookup.
      cache: the draft model's keys and values.
    """

    ids: Int32[Array, "pages page_size"] | None = None
    cache: Cache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a dispatch as they stand before a round.

    Attributes:
      tokens: the latest of each, not yet in the cache.
      positions: of these.
      left: tokens that may still come; 0 where the row is through.
      page_table: `[B, P]`, of the kind that reaches back furthest.
      sampling: settings.
    """

    tokens: Int32[Array, "B"]
    positions: Int32[Array, "B"]
    left: Int32[Array, "B"]
    page_table: Int32[Array, "B P"]
    sampling: RowSampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafts:
    """Guesses of what comes after each row's latest token.

    Attributes:
      tokens: in order.
      count: how many there are.
    """

    tokens: Int32[Array, "B M"]
    count: Int32[Array, "B"]

    @classmethod
    def none(cls, rows: "Rows", most: int) -> Self:
        zeros = jnp.zeros_like(rows.tokens)
        return cls(tokens=jnp.zeros((len(zeros), most), jnp.int32), count=zeros)

    def cut(self, most: int) -> Self:
        """With room for so many, which suffices where no row has more."""
        return dataclasses.replace(self, tokens=self.tokens[:, :most])

    @property
    def any(self) -> Bool[Array, ""]:
        """Whether any row has some."""
        return jnp.any(self.count > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tally:
    """How the drafts of a dispatch did, of each row.

    Attributes:
      drafted, accepted: drafts that the model was asked about, and those that were right.
      tested: drafts of which it is known whether they were right: up to the first wrong one of a round.
    """

    drafted: Int32[Any, "*n B"]
    accepted: Int32[Any, "*n B"]
    tested: Int32[Any, "*n B"]

    @classmethod
    def empty(cls, rows: int) -> Self:
        zeros = jnp.zeros(rows, jnp.int32)
        return cls(drafted=zeros, accepted=zeros, tested=zeros)

    def add(self, drafts: Drafts, accepted: Int32[Array, "B"]) -> Self:
        """One round's, and how many of them were accepted."""
        return type(self)(
            drafted=self.drafted + drafts.count,
            accepted=self.accepted + accepted,
            tested=self.tested + jnp.minimum(accepted + 1, drafts.count),
        )


def remember(spec: Speculation, memory: Memory, batch: Batch) -> Memory:
    """Notes the tokens that are fed to the model, for prompt lookup."""
    if memory.ids is None:
        return memory
    assert batch.page_table is not None
    count, page_size = memory.ids.shape
    place = batch.slots, batch.positions // page_size
    page = batch.page_table[spec.kind].at[place].get(mode="fill", fill_value=count)
    ids = memory.ids.at[page, batch.positions % page_size].set(batch.tokens, mode="drop")
    return dataclasses.replace(memory, ids=ids)


def follow(spec: Speculation, memory: Memory, draft: Transformer, batch: Batch) -> Memory:
    """Feeds the draft model what the model is fed."""
    assert memory.cache is not None and batch.page_table is not None
    batch = dataclasses.replace(batch, page_table=_tables(draft, batch.page_table[spec.kind]))
    return dataclasses.replace(memory, cache=draft.forward(batch, memory.cache)[1])


def _tables(draft: Transformer, page_table: Int32[Array, "B P"]) -> Int32[Array, "G B P"]:
    """The draft model's pages go by one table, whatever its windows: nothing that it sees is missing there."""
    return jnp.stack([page_table] * len(draft.config.window_kinds))


def look_up(
    spec: Speculation, ids: Int32[Array, "pages page_size"], rows: Rows, most: Int32[Array, ""]
) -> Drafts:
    """What followed where the latest tokens stood before; of several places the longest match, then the latest.

    As `prompt_lookup_num_tokens` of transformers.

    Args:
      spec: of the engine.
      ids: tokens in pages.
      rows: as they stand.
      most: drafts of a row.
    """
    known = ids[rows.page_table].reshape(len(rows.left), -1)
    at = rows.positions[:, None]
    place = jnp.arange(known.shape[1])[None, :]
    known = jnp.where(place == at, rows.tokens[:, None], known)
    reach = at if spec.window is None else jnp.minimum(at, spec.window - 1)
    matches = (place < at) & (place >= at - reach)
    length = jnp.zeros_like(known)
    for back in range(LONGEST):
        behind = jnp.pad(known, ((0, 0), (back, 0)))[:, : known.shape[1]]
        latest = jnp.take_along_axis(known, jnp.maximum(at - back, 0), axis=1)
        matches = matches & (behind == latest) & (place >= back) & (at >= back)
        length = length + matches.astype(jnp.int32)
    best = jnp.argmax(length * known.shape[1] + place, axis=1, keepdims=True)
    long = jnp.take_along_axis(length, best, axis=1)[:, 0] >= SHORTEST
    # Where the match ends at the latest token itself, the tokens repeat: so do the drafts.
    period = jnp.maximum(at - best, 1)
    tokens = jnp.take_along_axis(known, best + 1 + jnp.arange(spec.levels[-1])[None, :] % period, axis=1)
    return Drafts(tokens=tokens, count=jnp.where(long, _room(rows, most), 0))


def ask(
    spec: Speculation, memory: Memory, draft: Transformer, rows: Rows, most: Int32[Array, ""]
) -> tuple[Drafts, Memory]:
    """The draft model's own next tokens, and its memory: it has taken in the latest token and these.

    Args:
      spec, memory, draft: of the engine.
      rows: as they stand.
      most: drafts of a row; of none, it takes in nothing.
    """
    count = _room(rows, most)

    def once(step: Array, carry: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        tokens, latest, cache = carry
        positions = rows.positions + step
        batch = Batch.decode(latest, positions, _tables(draft, rows.page_table))
        own = jnp.where((rows.left > 0) & (step <= count), batch.slots, len(count))
        hidden, cache = draft.forward(dataclasses.replace(batch, slots=own), cache)
        latest = sample(draft.logits(hidden), rows.sampling, positions)
        return tokens.at[:, step].set(latest, mode="drop"), latest, cache

    tokens = jnp.zeros((len(count), spec.levels[-1]), jnp.int32)
    # One step more than there are drafts: the last one's keys and values are wanted if it is accepted.
    steps = jnp.where((most > 0) & jnp.any(rows.left > 0), jnp.max(count) + 1, 0)
    tokens, _, cache = jax.lax.fori_loop(0, steps, once, (tokens, rows.tokens, memory.cache))
    return Drafts(tokens=tokens, count=count), dataclasses.replace(memory, cache=cache)


def _room(rows: Rows, most: Int32[Array, ""]) -> Int32[Array, "B"]:
    """A round gives one token more than drafts that are right."""
    return jnp.clip(rows.left - 1, 0, most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the tokens of a round lie, row after row.

    Attributes:
      tokens: fed.
      rows: B for padding.
      offset: of each token behind its row's latest.
      start: `[B+1]`, where each row's tokens start.
    """

    tokens: Int32[Array, "T"]
    rows: Int32[Array, "T"]
    offset: Int32[Array, "T"]
    start: Int32[Array, "B1"]

    @classmethod
    def of(cls, rows: Rows, drafts: Drafts) -> Self:
        """Each row's latest token, and behind it its drafts."""
        size, room = drafts.tokens.shape
        start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(1 + drafts.count).astype(jnp.int32)])
        place = jnp.arange(size * (1 + room), dtype=jnp.int32)
        row = jnp.searchsorted(start[1:], place, side="right").astype(jnp.int32)
        own = jnp.minimum(row, size - 1)
        offset = place - start[own]
        drafted = drafts.tokens[own, jnp.clip(offset - 1, 0, room - 1)]
        through = (row == size) | (rows.left[own] == 0)
        return cls(
            tokens=jnp.where(offset == 0, rows.tokens[own], drafted),
            rows=jnp.where(through, size, row),
            offset=offset,
            start=start,
        )

    @classmethod
    def plain(cls, rows: Rows) -> Self:
        """Each row's latest token alone."""
        each = jnp.arange(len(rows.left) + 1, dtype=jnp.int32)
        own = jnp.where(rows.left > 0, each[:-1], each[-1])
        return cls(tokens=rows.tokens, rows=own, offset=jnp.zeros_like(own), start=each)

    def by_row(self, values: Shaped[Array, "T ..."], room: int) -> Shaped[Array, "M1 B ..."]:
        """What belongs to each row's latest token, then to its drafts; behind them others'."""
        place = self.start[None, :-1] + jnp.arange(room + 1)[:, None]
        return values[jnp.minimum(place, len(values) - 1)] if room else values[None]


def accepted(sampled: Int32[Array, "M1 B"], drafts: Drafts) -> Int32[Array, "B"]:
    """How many drafts of each row, from its first on, equal what the model sampled in their place."""
    most = drafts.tokens.shape[1]
    right = (drafts.tokens == sampled[:-1].T) & (jnp.arange(most)[None, :] < drafts.count[:, None])
    return jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
