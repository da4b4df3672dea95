"""Several steps of decoding in one dispatch, with end-of-sequence on the device; with drafts, in fewer rounds.

Letters: B rows of a step, M drafts of a row at most, T = B x (1 + M) tokens of a round.
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
    done = jax.lax.while_loop(lambda now: jnp.any(now.left > 0), rounds.advance, rounds.start(left, state))
    return done.out, keep_last(done.state, inputs, done.tokens, inputs.limit > 0)


class _Progress(NamedTuple):
    """How far a dispatch is: tokens that came of each row, those that may still come, and the latest."""

    came: Int32[Array, "B"]
    left: Int32[Array, "B"]
    tokens: Int32[Array, "B"]
    state: State
    out: Out


class _Round(NamedTuple):
    """What a round gives: the drafts, and what the model sampled after a row's latest token and after each of them."""

    sampled: Sampled
    drafts: Drafts | None
    right: Int32[Array, "B"]
    state: State


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """The rounds of one dispatch: what stays the same in all of them."""

    model: Transformer
    draft: Transformer | None
    inputs: Inputs
    program: Program

    def start(self, left: Int32[Array, "B"], state: State) -> _Progress:
        came = jnp.zeros_like(left)
        shapes = jax.eval_shape(self._round, came, left, self.inputs.tokens, state)
        store = lambda a: jnp.zeros((self.program.steps, *a.shape[1:]), a.dtype)
        out = Out(
            sampled=jax.tree.map(store, shapes.sampled),
            rounds=jnp.zeros((), jnp.int32),
            tally=None if shapes.drafts is None else Tally.empty(len(left)),
        )
        return _Progress(came, left, self.inputs.tokens, state, out)

    def advance(self, now: _Progress) -> _Progress:
        """Each row's tokens: after the latest, after each right draft, up to one that ends it."""
        sampled, drafts, right, state = self._round(now.came, now.left, now.tokens, now.state)
        place = jnp.arange(sampled.tokens.shape[0])[:, None]
        each = jnp.arange(sampled.tokens.shape[1])
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
        tally = out.tally.add(drafts, right) if out.tally and drafts else None
        sampled = jax.tree.map(keep, out.sampled, sampled)
        out = dataclasses.replace(out, sampled=sampled, rounds=out.rounds + 1, tally=tally)
        left = jnp.where(ended, 0, now.left - more)
        return _Progress(now.came + more, left, latest, state, out)

    def _round(self, came: Array, left: Array, tokens: Array, state: State) -> _Round:
        inputs, program, most = self.inputs, self.program, self.program.drafts
        rows = Rows(
            tokens=tokens,
            positions=inputs.positions + came,
            left=left,
            page_table=inputs.page_table[program.speculation.kind if program.speculation else 0],
            sampling=inputs.sampling,
        )
        drafts, state = self._drafts(rows, state)
        count = drafts.count if drafts else jnp.zeros_like(left)
        layout = Layout.of(rows, drafts, most) if drafts else Layout.plain(rows)
        own = jnp.minimum(layout.rows, len(count) - 1) if drafts else jnp.arange(len(count))
        positions = rows.positions[own] + layout.offset
        fed = dataclasses.replace(
            inputs,
            tokens=layout.tokens,
            positions=positions,
            rows=layout.rows,
            kv_len=rows.positions + 1 + count,
            query_start=layout.start,
        )
        hidden, state = forward(self.model, None, state, fed, program.speculation)
        sampling = jax.tree.map(lambda a: a[own], inputs.sampling) if drafts else inputs.sampling
        sampled = choose(
            self.model.logits(hidden), layout.tokens, positions, sampling, state, fed, program.processors
        )
        sampled = jax.tree.map(functools.partial(layout.by_row, most=most), sampled)
        right = speculative.accepted(sampled.tokens, drafts) if drafts else count
        return _Round(sampled, drafts, right, state)

    def _drafts(self, rows: Rows, state: State) -> tuple[Drafts | None, State]:
        """What the program drafts. What only the full program does follows one token at a time."""
        spec, most = self.program.speculation, self.program.drafts
        if not most or spec is None or state.memory is None or self.inputs.extras is not None:
            return None, state
        if self.draft is None:
            assert state.memory.ids is not None
            return speculative.look_up(spec, state.memory.ids, rows, most), state
        drafts, memory = speculative.ask(spec, state.memory, self.draft, rows, most)
        return drafts, dataclasses.replace(state, memory=memory)
