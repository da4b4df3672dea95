"""Everything mixed, in any order, with every read of the simulated device checked."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxopt_llm.engine.plan import Status
from jaxopt_llm.engine.scheduler import Scheduler, SchedulerConfig
from tests.engine.paged_device import VOCAB, Loop, prompt_of, shape


def mixed_load(loop, seed):
    """Plans of a mixed load, as plain numbers."""
    rng, plans = random.Random(seed), []
    for _ in range(24):
        loop.add(
            prompt_of(rng.randint(1, 20), rng.randint(0, 3)), rng.randint(0, 12), priority=rng.randint(0, 1)
        )
    while not loop.scheduler.idle:
        while len(loop.in_flight) < 2 and (plan := loop.schedule()):
            plans.append((shape(plan), plan.steps, plan.page_table.tolist()))
        loop.complete()
    loop.check_end()
    return plans


def test_the_same_arrivals_give_the_same_plans():
    tight = {"page_size": 2, "num_pages": (40, 20), "windows": (None, 6), "decode_steps": 3}
    first, second = (mixed_load(Loop(**tight), seed=5) for _ in range(2))
    assert first == second


SIZES = st.fixed_dictionaries(
    {
        "max_slots": st.integers(1, 5),
        "page_size": st.integers(1, 4),
        "max_tokens_per_step": st.sampled_from([5, 9, 40]),
        "max_seq_len": st.just(30),
    }
)
PACES = st.sampled_from([{"decode_steps": n} for n in (1, 3, 4)] + [{"stages": n} for n in (2, 3)])
WINDOWS = st.sampled_from([(None,), (None, 5), (3,), (None, 1, 8)])
REQUESTS = st.fixed_dictionaries(
    {
        "base": st.integers(0, 1),
        "shared": st.sampled_from([0, 4, 8, 10]),
        "own": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
        "max_tokens": st.sampled_from([14, 10, 1, 0]),
        "stops": st.sampled_from([False, False, True]),
        "stepwise": st.sampled_from([False, False, True]),
        "priority": st.sampled_from([1, 1, 0]),
        "reuse": st.sampled_from([True, True, False]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Everything at any time, over pools that are nearly too small; at the end each has exactly its own tokens."""

    @initialize(
        sizes=SIZES,
        pace=PACES,
        windows=WINDOWS,
        spare=st.integers(0, 6),
        first=st.lists(REQUESTS, max_size=6),
    )
    def start(self, sizes, pace, windows, spare, first):
        sizes |= pace
        config = SchedulerConfig(num_pages=(30,) * len(windows), windows=windows, **sizes)
        peaks = Scheduler(config)._tables.peak(28)
        self.loop = Loop(num_pages=tuple(peak + spare for peak in peaks), windows=windows, **sizes)
        self.add(first)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add_several(self, requests):
        self.add(requests)

    def add(self, requests):
        for request in requests:
            chosen = dict(request)
            prefix = prompt_of(10, chosen.pop("base"))[: chosen.pop("shared")]
            self.loop.add(prefix + chosen.pop("own"), chosen.pop("max_tokens"), **chosen)

    @precondition(lambda self: len(self.loop.in_flight) < self.loop.config.in_flight)
    @rule()
    def schedule(self):
        self.loop.schedule()

    @precondition(lambda self: any(dispatch.result is None for dispatch in self.loop.in_flight))
    @rule()
    def run_device(self):
        self.loop.run_device()

    @precondition(lambda self: self.loop.in_flight)
    @rule()
    def complete(self):
        self.loop.complete()

    @precondition(lambda self: not self.loop.scheduler.idle)
    @rule(count=st.integers(1, 8), ahead=st.integers(1, 4))
    def go_on(self, count, ahead):
        for _ in range(count):
            while len(self.loop.in_flight) < min(ahead, self.loop.config.in_flight) and self.loop.schedule():
                self.loop.check()
            if self.loop.in_flight:
                self.loop.complete()

    @precondition(lambda self: self.alive())
    @rule(data=st.data(), action=st.sampled_from(["cancel", "update"]))
    def seldom(self, data, action):
        request = data.draw(st.sampled_from(self.alive()))
        match action:
            case "cancel":
                self.loop.cancel(request)
            case "update":
                self.loop.update_weights()

    @invariant()
    def holds(self):
        if hasattr(self, "loop"):
            self.loop.check()

    def alive(self):
        return [request for request in self.loop.known if request.status is not Status.ENDED]

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30)
