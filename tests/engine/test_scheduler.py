"""Who runs when: batching, chunks, steps a dispatch and stops. The simulated device checks every read."""

import pytest

from jaxopt_llm.engine.plan import Status
from tests.engine.paged_device import Loop, prompt_of, shape


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
    with pytest.raises(
        ValueError, match="request 0 got no token of its prompt to go on from; finish it first"
    ):
        loop.scheduler.complete(plan, [[]])
    loop.cancel(plan.pieces[0].request)
    loop.scheduler.complete(plan, [[]])
    assert loop.scheduler.idle


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


def test_one_step_where_no_more_is_left():
    loop = Loop(decode_steps=4)
    loop.add(prompt_of(3, 1), 6)
    assert [loop.step().steps for _ in range(3)] == [1, 4, 1]
    loop.check_end()


def test_low_slots_are_used_first():
    loop = Loop(max_slots=4)
    requests = [loop.add(prompt_of(3, seed), 9) for seed in range(3)]
    loop.step()
    loop.cancel(requests[1])
    loop.cancel(requests[0])
    for seed in (5, 6):
        loop.add(prompt_of(3, seed), 9)
    assert [piece.slot for piece in loop.step().pieces] == [2, 0, 1]


def test_steps_end_where_a_slot_is_free_for_one_that_waits():
    loop = Loop(max_slots=2, decode_steps=4)
    for length in (7, 30):
        loop.add(prompt_of(3, length), length)
    assert loop.step().steps == 1
    other = loop.add(prompt_of(3), 9)
    assert [shape(loop.step()) for _ in range(2)] == [
        [(0, 3, 1, 4), (1, 3, 1, 4)],
        [(0, 7, 1, 2), (1, 7, 1, 2)],
    ]
    plan = loop.step()
    assert plan.steps == 1 and other in [piece.request for piece in plan.pieces]
    loop.drain()


def test_several_steps_while_one_waits_for_pages():
    loop = Loop(max_slots=2, decode_steps=4, page_size=4, num_pages=(4,), max_seq_len=16)
    loop.add(prompt_of(3), 11)
    loop.step()
    other = loop.add(prompt_of(15, 1), 1)
    assert [loop.step().steps for _ in range(3)] == [4, 4, 2]
    assert [piece.request for piece in loop.step().pieces] == [other]


def test_one_that_has_nothing_to_do_does_not_keep_others_from_several_steps():
    """As data shards share a dispatch, of as many steps as each may take."""
    loop = Loop(max_slots=2, decode_steps=4)
    assert loop.scheduler.steps == 4
    loop.add(prompt_of(3), 2)
    assert loop.scheduler.steps == 1
    loop.drain()
    assert loop.scheduler.steps == 4


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


def test_a_grammar_waits_for_its_last_token():
    loop = Loop(decode_steps=4)
    loop.add(prompt_of(3, 1), 4, stepwise=True)
    loop.add(prompt_of(3, 2), 9)
    loop.schedule()
    assert [p.request.id for p in loop.schedule().pieces] == [1]
    loop.complete()
    plan = loop.schedule()
    assert plan.steps == 1
    assert [p.request.id for p in plan.pieces] == [0, 1]
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


@pytest.mark.parametrize(("requests", "shares"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (2, [1, 1]), (1, [1])])
def test_stages_of_a_pipeline_have_equal_shares_of_what_decodes(requests, shares):
    loop = Loop(max_slots=8, stages=3)
    for i in range(requests):
        loop.add(prompt_of(4, i), 30)
    loop.step()
    for _ in range(3):  # rounds: everybody once, and nobody before the third plan after its last
        plans = [plan for plan in (loop.schedule() for _ in range(3)) if plan]
        assert sorted([len(plan.pieces) for plan in plans], reverse=True) == shares
        assert len({piece.request for plan in plans for piece in plan.pieces}) == requests
        while loop.in_flight:
            loop.complete()


def test_a_pipeline_is_kept_full_and_chunks_of_one_prompt_follow_each_other():
    loop = Loop(max_tokens_per_step=8, stages=2)
    loop.add(prompt_of(24, 0), 4)
    assert [loop.schedule().pieces[0].length for _ in range(3)] == [8, 8, 8]
    with pytest.raises(ValueError, match="3 plans are in flight; complete one first"):
        loop.schedule()
    loop.complete()
    assert loop.schedule() is None, "its token has not left the last stage"
    assert loop.drain(ahead=3) == 3


def test_a_pipeline_takes_one_step_at_a_time():
    with pytest.raises(ValueError, match="decode_steps=4 must be 1 with stages=2"):
        Loop(stages=2, decode_steps=4)
