"""The loop: plans, dispatches and what comes of them, the host one dispatch ahead of what it has read.

Each data shard has a scheduler, slots and pages of its own; one dispatch serves all of them.
"""

import contextlib
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from jaxopt_llm.engine import inputs
from jaxopt_llm.engine.clock import Clock
from jaxopt_llm.engine.drafting import Asked, Drafting, Record
from jaxopt_llm.engine.generation import Generation
from jaxopt_llm.engine.inputs import Shape, Widths
from jaxopt_llm.engine.plan import Metrics, Plan, Request
from jaxopt_llm.engine.program import Inputs, Out
from jaxopt_llm.engine.runner import Runner
from jaxopt_llm.engine.scheduler import Scheduler, SchedulerConfig


class _Dispatch(NamedTuple):
    """A step on its way, and what it is for: a plan and a generation for each of its pieces, of every data shard."""

    shape: Shape
    drafts: int
    sent: float
    out: Out
    plans: list[Plan | None]
    generations: list[list[Generation]]


class Loop:
    """Requests under way on one runner.

    Args:
      runner: the device's side.
      sizes: of each data shard.
      widths: of the arrays it sends.
      drafting: decides how many drafts are tried, where the runner makes any.
    """

    def __init__(
        self, runner: Runner, sizes: SchedulerConfig, widths: Widths, drafting: Drafting | None = None
    ):
        self.sizes = sizes
        self._runner, self._widths = runner, widths
        self._schedulers = [Scheduler(sizes) for _ in range(runner.shards)]
        self._running: list[dict[int, Generation]] = [{} for _ in self._schedulers]
        self._shapes: set[Shape] = set()  # of the programs that have run
        self._in_flight: deque[_Dispatch] = deque()
        self._drafting = drafting
        self._records: dict[int, Record] = {}  # of the requests under way, where drafts are tried
        self._drafted = self._accepted = 0
        self._clock = Clock()
        self._failure: BaseException | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to plan and nothing to read."""
        return all(scheduler.idle for scheduler in self._schedulers)

    def metrics(self) -> Metrics:
        """Over all data shards."""
        total = _sum([scheduler.metrics for scheduler in self._schedulers])
        return dataclasses.replace(
            total,
            programs=len(self._shapes),
            drafted=self._drafted,
            accepted=self._accepted,
            worked_s=self._clock.worked,
        )

    def check(self, request: Request) -> None:
        """Whether a request can ever run; any thread may ask.

        Raises:
          ValueError: if not.
        """
        self._schedulers[0].check(request)

    def add(self, generation: Generation) -> None:
        """Takes a request in, on the data shard that suits it best.

        Raises:
          ValueError: as `check`.
        """
        shard = min(range(len(self._running)), key=lambda i: self._rank(i, generation.request))
        self._schedulers[shard].add(generation.request)
        self._running[shard][generation.request.id] = generation
        if self._drafting:
            self._records[generation.request.id] = self._drafting.record(generation.request.prompt)

    def cancel(self, generation: Generation) -> None:
        """Ends a request where it is; nothing happens if it has ended, or was never added."""
        generation.end("cancelled")
        self._close(generation)

    def _close(self, generation: Generation) -> None:
        """Forgets a request that has ended."""
        self._records.pop(generation.request.id, None)
        for scheduler, running in zip(self._schedulers, self._running, strict=True):
            if running.pop(generation.request.id, None):
                end = scheduler.fail if generation.error else scheduler.finish
                end(generation.request)

    def settle(self) -> None:
        """Reads what is in flight, and sends nothing more."""
        while self._in_flight:
            self._read()

    def forget_prefixes(self) -> None:
        """The weights have changed: nothing computed so far is shared with later requests."""
        for scheduler in self._schedulers:
            scheduler.forget_prefixes()

    def advance(self) -> None:
        """Sends the next dispatch, and reads the one before it.

        Raises:
          RuntimeError: if an earlier dispatch failed: what was on the device is lost.
        """
        with self._guarded():
            plans = self._plans()
            if any(plans):
                self._in_flight.append(self._dispatch(plans))
            elif not self._in_flight:
                raise RuntimeError("nothing can be planned for requests that have not ended")
        if not any(plans) or len(self._in_flight) == self.sizes.in_flight:
            self._read()

    def warm_up(self, shape: Shape) -> None:
        """Compiles the program of this shape: see `inputs.idle`."""
        batch = inputs.idle(shape, self._widths, self._schedulers[0].page_table)
        self._run([batch] * len(self._schedulers), shape)

    def _rank(self, shard: int, request: Request) -> tuple[bool, int, int]:
        """The lowest goes first: the most of its prompt found computed, then the fewest requests; none that is full."""
        load = len(self._running[shard])
        full = load >= self.sizes.max_slots
        return full, 0 if full else -self._schedulers[shard].known(request), load

    def _read(self) -> None:
        """Waits for the oldest dispatch in flight. An interrupt that comes meanwhile loses nothing."""
        sampled, waited = self._in_flight[0].out.sampled, False
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # told again below
            waited = not sampled.tokens.is_ready()
            jax.block_until_ready(sampled)
        with self._guarded():
            dispatch = self._in_flight.popleft()
            seconds = self._clock.over(dispatch.sent, time.perf_counter(), waited=waited)
            self._collect(dispatch, seconds)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What breaks off in here leaves plans and device at odds."""
        if self._failure is not None:
            raise RuntimeError(
                "a step of this engine failed, and its cache is lost; make a new engine"
            ) from self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise

    def _plans(self) -> list[Plan | None]:
        """Of each data shard; all take part in one dispatch, so none decodes for more steps than another can."""
        if len(self._in_flight) == self.sizes.in_flight:
            return [None] * len(self._schedulers)
        steps = min(scheduler.steps for scheduler in self._schedulers)
        return [scheduler.schedule(steps) for scheduler in self._schedulers]

    def _dispatch(self, plans: list[Plan | None]) -> _Dispatch:
        sizes = self.sizes
        generations = [
            [running[piece.request.id] for piece in plan.pieces] if plan else []
            for plan, running in zip(plans, self._running, strict=True)
        ]
        full = any(generation.full for generation in itertools.chain(*generations))
        shape = inputs.shape([plan for plan in plans if plan], sizes, full=full)
        drafts = 0
        if self._drafting and shape.steps > 1 and not full:
            records = [self._records[generation.request.id] for generation in itertools.chain(*generations)]
            drafts = self._drafting.level(records, shape.rows)
        batches = [
            inputs.build(
                plan or _nothing(self._schedulers[i]), generations[i], shape, self._widths, drafts=drafts
            )
            for i, plan in enumerate(plans)
        ]
        out = self._run(batches, shape)
        return _Dispatch(shape, drafts, time.perf_counter(), out, plans, generations)

    def _run(self, batches: Sequence[Inputs], shape: Shape) -> Out:
        self._shapes.add(shape)
        return self._runner.run(batches, steps=shape.steps, full=shape.full)

    def _learn(self, dispatch: _Dispatch, outs: Sequence[Out], seconds: float | None) -> None:
        """How long the device took for a dispatch, where that is known, and how many drafts were right."""
        rounds = [out.rounds.tolist() for out in outs if out.rounds is not None]
        if self._drafting is None or dispatch.shape.full or not rounds:
            return
        if seconds is not None:
            self._drafting.learn(dispatch.shape.rows, dispatch.drafts, max(rounds, key=sum), seconds)
        for out in outs:
            if out.tally:
                self._drafted += int(out.tally.drafted.sum())
                self._accepted += int(out.tally.accepted.sum())

    def _collect(self, dispatch: _Dispatch, seconds: float | None) -> None:
        """Gives each request what a dispatch gave it, in so many seconds."""
        measures = any(generation.measures for generation in itertools.chain(*dispatch.generations))
        outs = self._runner.read(dispatch.out, whole=measures)
        now = time.perf_counter()
        self._learn(dispatch, outs, seconds)
        for scheduler, plan, generations, out in zip(
            self._schedulers, dispatch.plans, dispatch.generations, outs, strict=True
        ):
            if plan is None:
                continue
            starts = itertools.accumulate((piece.length for piece in plan.pieces), initial=0)
            tokens = []
            for row, (piece, generation, start) in enumerate(
                zip(plan.pieces, generations, starts, strict=False)
            ):
                generation.take_prompt(piece, out, start)
                tokens.append(generation.take_tokens(piece, out.sampled, row, now))
                if record := self._records.get(piece.request.id):
                    record.take(tokens[-1], _asked(out, dispatch.drafts, row))
                if generation.error:  # it has no tokens to go on from
                    self._close(generation)
            scheduler.complete(plan, tokens)
            for generation in generations:
                if generation.ended:
                    self._close(generation)


def _nothing(scheduler: Scheduler) -> Plan:
    """For a data shard that has nothing to do while others have."""
    return Plan(pieces=(), steps=1, page_table=scheduler.page_table)


def _asked(out: Out, drafts: int, row: int) -> Asked | None:
    if out.rounds is None:
        return None
    tested, right = (int(out.tally.tested[row]), int(out.tally.accepted[row])) if out.tally else (0, 0)
    return Asked(drafts=drafts, tested=tested, right=right)


def _sum(parts: Sequence[Metrics]) -> Metrics:
    total = lambda name: sum(getattr(part, name) for part in parts)
    each = lambda name: tuple(map(sum, zip(*(getattr(part, name) for part in parts), strict=True)))
    return Metrics(
        waiting=total("waiting"),
        running=total("running"),
        pages_used=each("pages_used"),
        pages_cached=each("pages_cached"),
        pages_free=each("pages_free"),
        prefix_hit_tokens=total("prefix_hit_tokens"),
        preemptions=total("preemptions"),
    )
