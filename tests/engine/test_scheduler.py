"""The scheduler: one behaviour a test, then all of them mixed, with every read of the simulated device checked."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxopt_llm.engine.plan import Request, Status
from jaxopt_llm.engine.scheduler import Scheduler, SchedulerConfig
from tests.engine.paged_device import VOCAB, Loop


def prompt_of(length, seed=0):
    return random.Random(seed).choices(range(VOCAB), k=length)


def shape(plan):
    """(request's id, start, length, limit) of each piece."""
    return [(p.request.id, p.start, p.length, p.limit) for p in plan.pieces]


def test_one_request():
    loop = Loop(page_size=4)
    request = loop.add(prompt_of(6), 3)
    plan = loop.step()
    assert shape(plan) == [(0, 0, 6, 1)] and plan.pieces[0].begins
    plan = loop.step()
    assert shape(plan) == [(0, 6, 1, 1)] and not plan.pieces[0].begins
    assert shape(loop.step()) == [(0, 7, 1, 1)]
    assert loop.step() is None
    assert request.status is Status.ENDED
    assert len(request.output) == 3
    loop.check_end()


def test_a_prompt_alone():
    """`max_tokens=0`: nothing is sampled."""
    loop = Loop(max_tokens_per_step=4)
    request = loop.add(prompt_of(6), 0)
    assert shape(loop.step()) == [(0, 0, 4, 0)]
    plan = loop.step()
    assert shape(plan) == [(0, 4, 2, 0)]
    assert not plan.pieces[0].samples
    assert request.status is Status.ENDED and request.output == []
    loop.check_end()


def test_prompts_go_in_chunks_beside_decodes():
    loop = Loop(max_tokens_per_step=8)
    loop.add(prompt_of(4, 1), 8)
    assert shape(loop.step()) == [(0, 0, 4, 1)]
    loop.add(prompt_of(18, 2), 2)
    loop.add(prompt_of(3, 3), 2)
    assert shape(loop.step()) == [(0, 4, 1, 1), (1, 0, 7, 0)]
    assert shape(loop.step()) == [(0, 5, 1, 1), (1, 7, 7, 0)]
    assert shape(loop.step()) == [(0, 6, 1, 1), (1, 14, 4, 1), (2, 0, 3, 1)]
    assert shape(loop.step()) == [(0, 7, 1, 1), (1, 18, 1, 1), (2, 3, 1, 1)]
    loop.drain()


def test_plans_are_made_before_tokens_are_known():
    loop = Loop()
    request = loop.add(prompt_of(4), 3)
    first = loop.schedule()
    second = loop.schedule()
    assert shape(second) == [(0, 4, 1, 1)]
    assert second.pieces[0].decodes and not first.pieces[0].decodes
    with pytest.raises(ValueError, match="2 plans are in flight; complete one first"):
        loop.scheduler.schedule()
    with pytest.raises(ValueError, match="not the oldest"):
        loop.scheduler.complete(second, [[0]])
    loop.complete()
    third = loop.schedule()
    assert shape(third) == [(0, 5, 1, 1)]
    loop.complete()
    assert loop.schedule() is None, "its last token is planned"
    assert request.status is Status.RUNNING
    loop.complete()
    assert request.status is Status.ENDED
    loop.check_end()


def test_tokens_must_belong_to_their_pieces():
    loop = Loop()
    loop.add(prompt_of(4), 3)
    plan = loop.schedule()
    with pytest.raises(ValueError, match="2 lists of tokens for 1 pieces"):
        loop.scheduler.complete(plan, [[1], [2]])
    with pytest.raises(ValueError, match="request 0 got 2 tokens and its limit was 1"):
        loop.scheduler.complete(plan, [[1, 2]])
    loop.complete()
    loop.drain()


def test_order_is_priority_then_arrival():
    loop = Loop(max_slots=1)
    for priority in (1, 0, 1, 0):
        loop.add(prompt_of(3), 1, priority=priority, reuse=False)
    order = [loop.step().pieces[0].request.id for _ in range(4)]
    assert order == [1, 3, 0, 2]


def test_nobody_overtakes_one_that_waits_for_pages():
    loop = Loop(page_size=4, num_pages=(6,))
    loop.add(prompt_of(12, 1), 5)
    loop.step()
    loop.add(prompt_of(16, 2), 2)  # four pages, and three are left
    loop.add(prompt_of(2, 3), 2)
    assert [p.request.id for p in loop.step().pieces] == [0]
    assert loop.scheduler.metrics.waiting == 2
    loop.drain()


def test_several_steps_when_all_decode_and_none_waits():
    loop = Loop(max_slots=2, decode_steps=4, page_size=4)
    short = loop.add(prompt_of(3, 1), 3)
    long = loop.add(prompt_of(3, 2), 11)
    assert loop.step().steps == 1
    plan = loop.step()
    assert plan.steps == 4
    assert shape(plan) == [(0, 3, 1, 2), (1, 3, 1, 4)]
    assert short.status is Status.ENDED and len(long.output) == 5
    loop.add(prompt_of(3, 3), 2)
    assert loop.step().steps == 1
    assert loop.step().steps == 4
    loop.drain()


def test_one_step_at_a_time_while_one_waits():
    loop = Loop(max_slots=1, decode_steps=4)
    loop.add(prompt_of(3), 6)
    loop.step()
    other = loop.add(prompt_of(3), 1)
    assert loop.step().steps == 1
    loop.cancel(other)
    assert loop.step().steps == 4


def test_no_look_ahead_at_the_price_of_pages():
    """Two requests, one token before the end of a page, and one page left for both: nobody leaves for the other's
    later steps, and then the first to need the page has it."""
    loop = Loop(decode_steps=4, page_size=4, num_pages=(3,), max_seq_len=16)
    for seed in (1, 2):
        loop.add(prompt_of(3, seed), 8)
    loop.step()
    assert loop.step().steps == 1
    assert loop.scheduler.metrics.preemptions == 0
    assert shape(loop.step()) == [(0, 4, 1, 1)]
    assert loop.scheduler.metrics.preemptions == 0
    loop.drain()


def test_a_stop_token_ends_within_a_dispatch_and_before_the_plan_in_flight():
    for decode_steps in (1, 4):
        for ahead in (1, 2):
            loop = Loop(decode_steps=decode_steps)
            requests = [loop.add(prompt_of(5, seed), 30, stops=True) for seed in range(4)]
            loop.drain(ahead=ahead)
            assert all(r.output[-1] == 0 and 0 not in r.output[:-1] for r in requests)
            assert min(len(r.output) for r in requests) < 30


def test_going_on_past_an_end_is_refused():
    loop = Loop(decode_steps=4)
    loop.add(prompt_of(5), 20)
    scheduler = loop.scheduler
    scheduler.complete(scheduler.schedule(), [[1]])
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.complete(first, [[1, 2]])
    with pytest.raises(ValueError, match="8 tokens and was planned on from 10: it ended early"):
        scheduler.complete(second, [[1]])


def test_a_prefix_is_computed_once():
    loop = Loop(page_size=4)
    prefix = prompt_of(13)
    first = loop.add(prefix, 4)
    loop.drain()
    second = loop.add([*prefix, 1, 2], 2)
    third = loop.add(prefix[:12], 2)
    plan = loop.step()
    assert shape(plan) == [(1, 12, 3, 1), (2, 8, 4, 1)], "the last token of a prompt is always computed"
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 12, 8)
    assert loop.scheduler.metrics.prefix_hit_tokens == 20
    loop.drain()


def test_a_prefix_is_shared_while_it_is_still_computed():
    """The plan after the one that writes a page may read it; the same plan may not."""
    loop = Loop(page_size=4, max_tokens_per_step=16)
    prompt = prompt_of(10)
    loop.add(prompt, 3)
    loop.add(prompt[:5], 3)
    assert shape(loop.schedule()) == [(0, 0, 10, 1), (1, 0, 5, 1)]
    loop.add(prompt, 3)
    assert shape(loop.schedule())[-1] == (2, 8, 2, 1)
    loop.drain()


def test_output_is_found_too():
    loop = Loop(page_size=4)
    first = loop.add(prompt_of(6), 11)
    loop.drain()
    second = loop.add([*first.tokens, 1, 2, 3], 2)
    loop.drain()
    assert second.cached_tokens == 16  # of 17 tokens, the last of which was never fed


def test_keys_keep_prefixes_apart():
    loop = Loop(page_size=4)
    prompt = prompt_of(10)
    for key in ("", "adapter"):
        loop.add(prompt, 2, cache_key=key)
        loop.drain()
    again = loop.add(prompt, 2, cache_key="adapter")
    alone = loop.add(prompt, 2, cache_key="adapter", reuse=False)
    loop.drain()
    assert [r.cached_tokens for r in loop.known] == [0, 0, 8, 0]
    assert again.output == alone.output


def test_new_weights_share_nothing_with_old():
    loop = Loop(page_size=4)
    running = loop.add(prompt_of(10), 12)
    loop.step()
    loop.step()
    loop.update_weights()
    later = loop.add(prompt_of(10), 2)
    loop.drain()
    last = loop.add(running.tokens, 2)
    loop.drain()
    assert later.cached_tokens == 0
    assert last.cached_tokens == 8, "what was made of the new weights"


def test_pages_behind_the_window_come_back():
    loop = Loop(page_size=4, windows=(None, 6), num_pages=(16, 4))
    loop.add(prompt_of(8), 40)
    most = [0, 0]
    while loop.schedule():
        used = loop.scheduler.metrics.pages_used
        most = [max(pair) for pair in zip(most, used, strict=True)]
        loop.complete()
    assert most == [12, 3]
    loop.check_end()


def test_a_long_prompt_passes_through_a_small_window():
    """Its pages of the windowed kind are fewer than the prompt has: chunks get shorter."""
    loop = Loop(page_size=4, windows=(6, None), num_pages=(3, 16), max_slots=2)
    loop.add(prompt_of(40, 1), 8)
    loop.add(prompt_of(40, 2), 8)
    loop.drain()


def test_preempted_requests_lose_nothing():
    loop = Loop(page_size=4, num_pages=(8,), max_seq_len=32)
    first = loop.add(prompt_of(10, 1), 20)
    second = loop.add(prompt_of(10, 2), 20)
    late = loop.add(prompt_of(2, 3), 4, priority=1)
    loop.drain(ahead=1)
    assert first.preemptions == 0
    assert second.preemptions >= 1
    assert late.status is Status.ENDED
    assert loop.scheduler.metrics.preemptions == second.preemptions + late.preemptions


def test_preempted_in_flight_it_leaves_when_its_step_is_over():
    loop = Loop(page_size=4, num_pages=(2,), max_seq_len=8)
    first, second = loop.add(prompt_of(4, 1), 4), loop.add(prompt_of(2, 2), 3)
    loop.schedule()
    assert loop.schedule() is None, "one waits for the page that the other is still writing to"
    assert second.status is Status.PREEMPTED and loop.scheduler.metrics.pages_used == (2,)
    loop.complete()
    assert second.status is Status.WAITING and len(second.output) == 1, "nothing is lost"
    assert shape(loop.schedule()) == [(0, 4, 1, 1)]
    loop.drain()
    assert first.preemptions == 0


def test_nobody_is_preempted_for_pages_that_are_coming():
    """One request ends with the step in flight, another's own window moves on with it."""
    ending = Loop(page_size=4, num_pages=(3,), max_seq_len=12)
    windowed = Loop(page_size=4, num_pages=(3,), windows=(3,), max_seq_len=12)
    for loop, max_tokens in ((ending, 1), (windowed, 6)):
        loop.add(prompt_of(8, 1), 3)
        loop.add(prompt_of(2, 2), max_tokens)
        assert len(loop.schedule().pieces) == 2
        loop.schedule()
        loop.complete()
        assert loop.schedule().pieces[0].request.id == 0
        loop.drain()
        assert loop.scheduler.metrics.preemptions == 0


def test_the_last_one_keeps_its_pages_while_it_waits_for_more():
    loop = Loop(page_size=4, num_pages=(3,), max_seq_len=12)
    loop.add(prompt_of(5, 1), 2)
    last = loop.add(prompt_of(4, 2), 3)
    loop.step()
    assert shape(loop.step()) == [(0, 5, 1, 1)]
    assert last.status is Status.RUNNING
    assert shape(loop.step()) == [(1, 4, 1, 1)]
    loop.drain()
    assert last.preemptions == 0


def test_a_preempted_request_goes_before_later_ones():
    loop = Loop(page_size=4, num_pages=(6,), max_seq_len=24, max_slots=2)
    first = loop.add(prompt_of(8, 1), 15)
    second = loop.add(prompt_of(8, 2), 9)
    third = loop.add(prompt_of(8, 3), 2)
    finished = []
    while loop.step():
        finished += [r for r in (first, second, third) if r.status is Status.ENDED and r not in finished]
    assert second.preemptions == 1
    assert finished == [first, second, third]


def test_the_least_important_is_preempted():
    loop = Loop(page_size=4, num_pages=(6,), max_seq_len=24)
    low = loop.add(prompt_of(4, 1), 12, priority=5)
    loop.step()
    high = loop.add(prompt_of(8, 2), 12)
    loop.drain()
    assert (low.preemptions, high.preemptions) == (1, 0)


def test_a_preempted_request_finds_its_own_pages():
    loop = Loop(page_size=4, num_pages=(10,), max_seq_len=40)
    loop.add(prompt_of(16, 1), 17)
    second = loop.add(prompt_of(16, 2), 17)
    starts = []
    while plan := loop.step():
        starts += [p.start for p in plan.pieces if p.request is second and not p.decodes]
    assert second.preemptions == 1
    assert starts[0] == 0 and starts[-1] > 0
    assert second.cached_tokens == 0, "of its prompt, nothing was there when it came"


def test_a_request_that_never_fits_is_refused():
    loop = Loop(page_size=4, num_pages=(8, 4), windows=(None, 14), max_seq_len=40)
    add = lambda length, tokens: loop.add(prompt_of(length), tokens)
    with pytest.raises(
        ValueError, match="30 prompt tokens and max_tokens=11, together more than max_seq_len=40"
    ):
        add(30, 11)
    with pytest.raises(ValueError, match=r"needs 9 pages of 4 tokens \(window=None\) and there are 8"):
        add(30, 4)
    with pytest.raises(ValueError, match=r"needs 5 pages of 4 tokens \(window=14\) and there are 4"):
        add(15, 4)
    with pytest.raises(ValueError, match="0 prompt tokens"):
        add(0, 4)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        add(4, -1)
    request = add(10, 7)
    with pytest.raises(ValueError, match="added before"):
        loop.scheduler.add(request)
    with pytest.raises(ValueError, match="never added"):
        loop.scheduler.finish(Request(id=0, prompt=[1], max_tokens=1))
    loop.drain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_slots": 0}, "max_slots=0 must be at least 1"),
        ({"decode_steps": 0}, "decode_steps=0 must be at least 1"),
        ({"num_pages": (4, 4)}, "one entry for each"),
        ({"num_pages": (0,)}, "at least 1 each"),
        ({"windows": (0,)}, "at least 1 each"),
        ({"max_tokens_per_step": 3}, "max_tokens_per_step=3 must be at least max_slots=4"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        Loop(**change)


def test_cancelled_while_waiting_running_and_in_flight():
    loop = Loop(max_slots=1, page_size=4)
    running = loop.add(prompt_of(6, 1), 9)
    waiting = loop.add(prompt_of(6, 2), 9)
    last = loop.add(prompt_of(6, 3), 3)
    loop.cancel(waiting)
    assert loop.scheduler.metrics.waiting == 2
    loop.schedule()
    loop.schedule()
    loop.cancel(running)
    loop.cancel(running)
    assert loop.scheduler.metrics.pages_used == (2,), "plans in flight write to them"
    loop.complete()
    assert loop.scheduler.metrics.pages_used == (2,)
    assert loop.schedule() is None
    loop.complete()
    assert loop.scheduler.metrics.pages_used == (0,)
    assert running.output == [], "tokens of a cancelled request are dropped"
    assert shape(loop.step()) == [(2, 0, 6, 1)]
    loop.cancel(last)
    loop.check_end()


def test_drafts_are_verified_and_counts_follow():
    loop = Loop(page_size=4)
    request = loop.add(prompt_of(5), 12, drafts=())
    loop.step()
    loop.draft(request, right=2, wrong=2)
    plan = loop.schedule()
    assert shape(plan) == [(0, 5, 5, 5)]
    assert loop.schedule() is None, "how many are accepted is not known yet"
    request.drafts = None
    assert loop.schedule() is None, "and that does not change with how it goes on"
    loop.complete()
    assert (len(request.output), request.computed) == (4, 8)
    request.drafts = ()
    loop.draft(request, right=9, wrong=0)
    assert shape(loop.step()) == [(0, 8, 8, 8)], "no more than it may still give"
    loop.check_end()


def test_drafts_take_half_of_what_decodes_leave():
    loop = Loop(max_tokens_per_step=10, max_slots=3)
    requests = [loop.add(prompt_of(3, seed), 20, drafts=()) for seed in (1, 2)]
    loop.step()
    loop.add(prompt_of(20, 3), 1)
    for request in requests:
        loop.draft(request, right=3, wrong=0)
    assert shape(loop.step()) == [(0, 3, 4, 4), (1, 3, 2, 2), (2, 0, 4, 0)]
    loop.drain()


def test_drafts_take_no_pages_from_others():
    loop = Loop(page_size=4, num_pages=(4,), max_seq_len=16)
    request = loop.add(prompt_of(7, 1), 9, drafts=())
    other = loop.add(prompt_of(7, 2), 2)
    loop.step()
    loop.draft(request, right=8, wrong=0)
    assert shape(loop.step())[0] == (0, 7, 1, 1)
    assert other.preemptions == 0
    loop.drain()


def test_a_grammar_waits_for_its_last_token():
    loop = Loop(decode_steps=4)
    masked = loop.add(prompt_of(3, 1), 4, drafts=())
    loop.add(prompt_of(3, 2), 9)
    loop.schedule()
    assert [p.request.id for p in loop.schedule().pieces] == [1]
    loop.complete()
    plan = loop.schedule()
    assert plan.steps == 1
    assert [p.request.id for p in plan.pieces] == [0, 1]
    masked.drafts = None
    loop.drain()


def test_metrics():
    loop = Loop(page_size=4, num_pages=(8,), max_slots=1)
    loop.add(prompt_of(9, 1), 5)
    loop.add(prompt_of(9, 2), 5)
    loop.step()
    metrics = loop.scheduler.metrics
    assert (metrics.waiting, metrics.running) == (1, 1)
    assert (metrics.pages_used, metrics.pages_cached, metrics.pages_free) == ((3,), (0,), (5,))
    loop.drain()
    metrics = loop.scheduler.metrics
    assert (metrics.pages_used, metrics.pages_cached, metrics.pages_free) == ((0,), (6,), (2,))


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
        "decode_steps": st.sampled_from([1, 3, 4]),
        "max_seq_len": st.just(30),
    }
)
WINDOWS = st.sampled_from([(None,), (None, 5), (3,), (None, 1, 8)])
REQUESTS = st.fixed_dictionaries(
    {
        "base": st.integers(0, 1),
        "shared": st.sampled_from([0, 4, 8, 10]),
        "own": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
        "max_tokens": st.sampled_from([14, 10, 1, 0]),
        "stops": st.sampled_from([False, False, True]),
        "drafts": st.sampled_from([None, None, ()]),
        "priority": st.sampled_from([1, 1, 0]),
        "cache_key": st.sampled_from(["", "", "adapter"]),
        "reuse": st.sampled_from([True, True, False]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Everything at any time, over pools that are nearly too small; at the end each has exactly its own tokens."""

    @initialize(sizes=SIZES, windows=WINDOWS, spare=st.integers(0, 6), first=st.lists(REQUESTS, max_size=6))
    def start(self, sizes, windows, spare, first):
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

    @precondition(lambda self: len(self.loop.in_flight) < 2)
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
    @rule(count=st.integers(1, 8), ahead=st.integers(1, 2))
    def go_on(self, count, ahead):
        for _ in range(count):
            while len(self.loop.in_flight) < ahead and self.loop.schedule():
                self.loop.check()
            if self.loop.in_flight:
                self.loop.complete()

    @precondition(lambda self: self.guessing())
    @rule(right=st.integers(0, 4), wrong=st.integers(0, 2))
    def draft_and_go_on(self, right, wrong):
        for request in self.guessing():
            self.loop.draft(request, right, wrong)
        if len(self.loop.in_flight) < 2:
            self.loop.schedule()

    @precondition(lambda self: self.alive())
    @rule(data=st.data(), action=st.sampled_from(["wait", "hurry", "draft", "cancel", "update"]))
    def seldom(self, data, action):
        request = data.draw(st.sampled_from(self.alive()))
        match action:
            case "wait":
                request.drafts = ()
            case "hurry":
                request.drafts = None
            case "draft":
                self.loop.draft(request, right=2, wrong=1)
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

    def guessing(self):
        return [r for r in self.alive() if r.drafts is not None and r.decoding and not r.in_flight]

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30)
