"""When each stage of a pipeline worked on what, as threads see it that wait for what the stages give."""

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

_MOST = 100_000  # spans that are kept


class Span(NamedTuple):
    """One stage at one dispatch.

    Attributes:
      stage, dispatch: which, from 0.
      decodes: whether every row of it decoded.
      start: when all that it needs was there, seconds: it was sent, the stage was free, the stage before was through.
      end: when what it gives was there.
    """

    stage: int
    dispatch: int
    decodes: bool
    start: float
    end: float


class Timeline:
    """What a run's stages did.

    Attributes:
      stages: how many.
      spans: by dispatch, and by stage within one.
    """

    def __init__(self, stages: int, spans: Sequence[Span] = ()):
        self.stages = stages
        self.spans = list(spans)

    def busy(self) -> list[float]:
        """The share of the time that each stage is at work while all of them decode; nothing if they never do."""
        decoding = [span for span in self.spans if span.decodes]
        through = [span.end for span in decoding if span.stage == self.stages - 1]
        begun = [span.start for span in decoding if span.stage == 0]
        start, end = min(through, default=0.0), max(begun, default=0.0)
        if end <= start:
            return []
        at_work = [0.0] * self.stages
        for span in self.spans:
            at_work[span.stage] += max(0.0, min(span.end, end) - max(span.start, start))
        return [seconds / (end - start) for seconds in at_work]

    def of_balanced(self) -> list[float]:
        """`busy`, as parts of what each stage would be if the slowest never waited."""
        busy = self.busy()
        if not busy:
            return []
        mean = [
            sum(span.end - span.start for span in spans) / len(spans)
            for spans in (
                [span for span in self.spans if span.decodes and span.stage == stage]
                for stage in range(self.stages)
            )
        ]
        return [share * max(mean) / max(own, 1e-9) for share, own in zip(busy, mean, strict=True)]


class Watch:
    """Fills a timeline, with a thread for each stage; `close` waits for what was sent."""

    def __init__(self, stages: int):
        self.timeline = Timeline(stages)
        self._dispatches = itertools.count()
        self._ends: list[dict[int, float]] = [{} for _ in range(stages)]
        self._sent: dict[int, tuple[float, bool]] = {}
        self._queues: list[queue.SimpleQueue[tuple[int, jax.Array] | None]] = [
            queue.SimpleQueue() for _ in range(stages)
        ]
        self._threads = [
            threading.Thread(target=self._wait, args=(stage,), daemon=True) for stage in range(stages)
        ]
        for thread in self._threads:
            thread.start()

    def sent(self, outputs: Sequence[jax.Array], *, at: float, decodes: bool) -> None:
        """A dispatch was sent, and this is what each stage gives; what an output holds is not looked at."""
        dispatch = next(self._dispatches)
        if dispatch * len(outputs) >= _MOST:
            return
        self._sent[dispatch] = at, decodes
        for waiting, output in zip(self._queues, outputs, strict=True):
            waiting.put((dispatch, output))

    def close(self) -> Timeline:
        """The timeline, once all that was sent is over."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            thread.join()
        complete = [dispatch for dispatch in self._sent if all(dispatch in ends for ends in self._ends)]
        # A thread may have come late to see an end: nothing ends after what can only follow it.
        follows = [float("inf")] * len(self._ends)
        for dispatch in reversed(complete):
            later = float("inf")
            for stage in reversed(range(len(self._ends))):
                later = follows[stage] = self._ends[stage][dispatch] = min(
                    self._ends[stage][dispatch], follows[stage], later
                )
        free = [0.0] * len(self._ends)
        for dispatch in complete:
            there, decodes = self._sent[dispatch]
            for stage, ends in enumerate(self._ends):
                start = max(there, free[stage])
                self.timeline.spans.append(Span(stage, dispatch, decodes, start, ends[dispatch]))
                there = free[stage] = ends[dispatch]
        return self.timeline

    def _wait(self, stage: int) -> None:
        while (item := self._queues[stage].get()) is not None:
            dispatch, output = item
            try:
                output.block_until_ready()
            except jax.errors.JaxRuntimeError:  # told where the engine reads it
                continue
            self._ends[stage][dispatch] = time.perf_counter()
