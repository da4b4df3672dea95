"""Several steps of decoding in one dispatch, with end-of-sequence on the device; with drafts, in fewer rounds.

Letters: B rows of a step, M drafts of a row at most, T tokens of a round: one a row, and room for drafts.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxopt_llm.engine import speculative
from jaxopt_llm.engine.passes import choose, forward, keep_last
from jaxopt_llm.engine.program import Inputs, Out, Program, Sampled, State
from jaxopt_llm.engine.speculative import Drafts, Layout, Rows, Tally
from jaxopt_llm.models import Transformer


def decode(
    model: Transformer, draft: Transformer | None, state: State, inputs: Inputs, program: Program
) -> tuple[Out, State]:
    """Rounds until every row has its tokens: each gives a row one, and those of its drafts that are right.

    Args:
      model, draft: as they run.
      state: donated.
      inputs: the latest token of each row.
      program: as it is compiled.
    """
    rounds = _Rounds(model, draft, inputs, program)
    # The dispatch before may have ended a row, which the host has not read yet.
    left = jnp.where(jnp.any(inputs.tokens[:, None] == inputs.stop_ids, axis=1), 0, inputs.limit)
    done = jax.lax.while_loop(lambda now: jnp.any(now.left > 0), rounds.turn, rounds.start(left, state))
    return done.out, keep_last(done.state, inputs, done.tokens, inputs.limit > 0)


class _Progress(NamedTuple):
    """How far a dispatch is.

    Attributes:
      came: tokens of each row.
      left: those that may still come.
      tokens: the latest.
      drafts: of what comes next; None where the program drafts nothing.
      state: donated from round to round.
      out: so far.
    """

    came: Int32[Array, "B"]
    left: Int32[Array, "B"]
    tokens: Int32[Array, "B"]
    drafts: Drafts | None
    state: State
    out: Out


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """The rounds of one dispatch: what stays the same in all of them."""

    model: Transformer
    draft: Transformer | None
    inputs: Inputs
    program: Program

    @property
    def rooms(self) -> tuple[int, ...]:
        """Drafts of a row that rounds have room for. What only the full program does follows one token at a time."""
        spec = self.program.speculation
        return (0,) if spec is None or self.inputs.extras is not None else spec.levels

    def start(self, left: Int32[Array, "B"], state: State) -> _Progress:
        rows = self._rows(jnp.zeros_like(left), left, self.inputs.tokens)
        shapes, _ = jax.eval_shape(functools.partial(self._sample, 0), rows, None, state)
        store = lambda a: jnp.zeros((self.program.steps, *a.shape[1:]), a.dtype)
        drafts, state = self._draft(rows, state)
        out = Out(
            sampled=jax.tree.map(store, shapes),
            rounds=jnp.zeros(2, jnp.int32),
            tally=None if drafts is None else Tally.empty(len(left)),
        )
        return _Progress(jnp.zeros_like(left), left, rows.tokens, drafts, state, out)

    def turn(self, now: _Progress) -> _Progress:
        """Rounds of each room, while it is the one to take: none where no row has drafts, else what the host asks for.

        As loops, since XLA keeps the cache in place from round to round of a loop, and copies it for a `switch`.
        """
        for room in self.rooms:

            def fits(now: _Progress, room: int = room) -> Array:
                wanted = jnp.where(now.drafts.any, self.inputs.drafts, 0) if now.drafts else 0
                return jnp.any(now.left > 0) & (wanted == room)

            now = jax.lax.while_loop(fits, functools.partial(self._advance, room), now)
        return now

    def _advance(self, room: int, now: _Progress) -> _Progress:
        """Each row's tokens: after the latest, after each right draft, up to one that ends it."""
        rows = self._rows(now.came, now.left, now.tokens)
        drafts = now.drafts.cut(room) if now.drafts and room else None
        sampled, state = self._sample(room, rows, drafts, now.state)
        right = speculative.accepted(sampled.tokens, drafts) if drafts else jnp.zeros_like(now.left)
        place = jnp.arange(1 + room)[:, None]
        each = jnp.arange(len(now.left))
        ends = jnp.any(sampled.tokens[..., None] == self.inputs.stop_ids[None], axis=-1) & (
            place <= right[None]
        )
        ended = jnp.any(ends, axis=0)
        more = jnp.where(ended, jnp.argmax(ends, axis=0).astype(jnp.int32), right) + 1
        more = jnp.where(now.left > 0, more, 0)
        latest = jnp.where(now.left > 0, sampled.tokens[jnp.maximum(more - 1, 0), each], now.tokens)
        target = jnp.where(place < more[None], now.came[None] + place, self.program.steps)
        keep = lambda store, new: store.at[target, each[None, :]].set(new, mode="drop")
        out = now.out
        assert out.rounds is not None
        out = dataclasses.replace(
            out,
            sampled=jax.tree.map(keep, out.sampled, sampled),
            rounds=out.rounds.at[min(room, 1)].add(1),
            tally=out.tally.add(drafts, right) if out.tally and drafts else out.tally,
        )
        came, left = now.came + more, jnp.where(ended, 0, now.left - more)
        found, state = self._draft(self._rows(came, left, latest), state)
        return _Progress(came, left, latest, found, state, out)

    def _rows(self, came: Array, left: Array, tokens: Array) -> Rows:
        spec = self.program.speculation
        return Rows(
            tokens=tokens,
            positions=self.inputs.positions + came,
            left=left,
            page_table=self.inputs.page_table[spec.kind if spec else 0],
            sampling=self.inputs.sampling,
        )

    def _sample(self, room: int, rows: Rows, drafts: Drafts | None, state: State) -> tuple[Sampled, State]:
        """What the model samples after each row's latest token and after each draft, `[1 + room, B]`."""
        layout = Layout.of(rows, drafts) if drafts else Layout.plain(rows)
        own = jnp.minimum(layout.rows, len(rows.left) - 1) if room else jnp.arange(len(rows.left))
        positions = rows.positions[own] + layout.offset
        fed = dataclasses.replace(
            self.inputs,
            tokens=layout.tokens,
            positions=positions,
            rows=layout.rows,
            kv_len=rows.positions + 1 + (drafts.count if drafts else 0),
            query_start=layout.start,
        )
        hidden, state = forward(self.model, None, state, fed, self.program.speculation)
        sampling = jax.tree.map(lambda a: a[own], rows.sampling) if room else rows.sampling
        logits = self.model.logits(hidden)
        sampled = choose(logits, layout.tokens, positions, sampling, state, fed, self.program.processors)
        return jax.tree.map(functools.partial(layout.by_row, room=room), sampled), state

    def _draft(self, rows: Rows, state: State) -> tuple[Drafts | None, State]:
        """Drafts of what comes next, if any are asked for."""
        spec, asked = self.program.speculation, self.inputs.drafts
        if len(self.rooms) == 1 or spec is None or state.memory is None:
            return None, state
        if self.draft is None:
            assert state.memory.ids is not None
            look = functools.partial(speculative.look_up, spec, state.memory.ids, rows, asked)
            return jax.lax.cond(asked > 0, look, lambda: Drafts.none(rows, self.rooms[-1])), state
        drafts, memory = speculative.ask(spec, state.memory, self.draft, rows, asked)
        return drafts, dataclasses.replace(state, memory=memory)
