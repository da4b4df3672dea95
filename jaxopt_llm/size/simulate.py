"""The engine's own scheduler, driven by a clock of modelled steps: what each request waits for."""

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxopt_llm.engine.plan import Plan, Request
from jaxopt_llm.engine.scheduler import Scheduler, SchedulerConfig
from jaxopt_llm.size.traffic import Traffic, prompt_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What a simulation saw; an entry a request, in the order in which they were asked.

    Attributes:
      asked: when each came, in seconds.
      first, last: when its first and its last token were there.
      output: tokens that it got.
      preemptions: how often one had to leave for another.
      cached_tokens: of prompts, whose keys and values were there from earlier ones.
    """

    asked: Float[np.ndarray, "n"]
    first: Float[np.ndarray, "n"]
    last: Float[np.ndarray, "n"]
    output: Float[np.ndarray, "n"]
    preemptions: int
    cached_tokens: int

    @property
    def ttft_s(self) -> Float[np.ndarray, "n"]:
        return self.first - self.asked

    @property
    def tpot_s(self) -> Float[np.ndarray, "m"]:
        """Of requests with two tokens or more."""
        several = self.output > 1
        return (self.last - self.first)[several] / (self.output[several] - 1)

    @property
    def latency_s(self) -> Float[np.ndarray, "n"]:
        return self.last - self.asked

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated, from the first request to the last token."""
        return float(self.output.sum() / (self.last.max() - self.asked.min()))


def simulate(traffic: Traffic, config: SchedulerConfig, seconds: Callable[[Plan], float]) -> Served:
    """Runs requests through a scheduler.

    The host is taken to be faster than the device: the next plan is ready when a step ends.

    Args:
      traffic: the requests; they generate all the tokens they ask for.
      config: of the scheduler.
      seconds: that a plan takes.

    Raises:
      ValueError: for a request that does not fit.
    """
    scheduler, now = Scheduler(config), 0.0
    count = len(traffic.asked)
    asked, first, last = (np.zeros(count) for _ in range(3))
    coming = deque(enumerate(traffic.asked))
    running = 0

    def admit() -> None:
        nonlocal running
        while coming and (
            coming[0][1].at <= now if traffic.concurrency is None else running < traffic.concurrency
        ):
            number, one = coming.popleft()
            asked[number] = one.at if traffic.concurrency is None else now
            scheduler.add(
                Request(
                    id=number,
                    prompt=prompt_tokens(one, number),
                    max_tokens=one.output,
                    reuse=bool(one.blocks),
                )
            )
            running += 1

    while True:
        admit()
        plan = scheduler.schedule()
        if plan is None:
            if not coming:
                break
            now = coming[0][1].at
            continue
        now += seconds(plan)
        scheduler.complete(plan, [[0] * piece.limit for piece in plan.pieces])
        for piece in plan.pieces:
            request = piece.request
            if piece.limit and not first[request.id]:
                first[request.id] = now
            if len(request.tokens) == len(request.prompt) + request.max_tokens and not last[request.id]:
                last[request.id] = now
                running -= 1
    metrics = scheduler.metrics
    return Served(
        asked=asked,
        first=first,
        last=last,
        output=np.array([float(one.output) for one in traffic.asked]),
        preemptions=metrics.preemptions,
        cached_tokens=metrics.prefix_hit_tokens,
    )
