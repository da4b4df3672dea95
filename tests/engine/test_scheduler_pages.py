"""Who gets pages: shared prefixes, windows, preemption, refusals. The simulated device checks every read."""

import pytest

from jaxopt_llm.engine.plan import Request, Status
from tests.engine.paged_device import Loop, prompt_of, shape


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


def test_what_does_not_reuse_shares_nothing():
    loop = Loop(page_size=4)
    prompt = prompt_of(10)
    for reuse in (True, True, False):
        loop.add(prompt, 2, reuse=reuse)
        loop.drain()
    assert [r.cached_tokens for r in loop.known] == [0, 8, 0]
    assert len({tuple(r.output) for r in loop.known}) == 1


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
    loop = Loop(page_size=4, num_pages=(3,), max_seq_len=8)
    first, second, third = (loop.add(prompt_of(length, length), 3) for length in (4, 2, 1))
    loop.schedule()
    assert shape(loop.schedule()) == [(1, 2, 1, 1)], (
        "the first waits for the page that the third still writes to"
    )
    assert third.status is Status.PREEMPTED and loop.scheduler.metrics.pages_used == (3,)
    loop.complete()
    assert third.status is Status.WAITING and len(third.output) == 1, "nothing is lost"
    assert shape(loop.schedule()) == [(0, 4, 1, 1), (1, 3, 1, 1)]
    loop.drain()
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 0, 1)


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
