"""What the stages of a pipeline did when."""

import itertools

import pytest

from jaxopt_llm.engine import Engine, Span, Timeline
from jaxopt_llm.report import draw_schedule
from tests.engine import oracle
from tests.engine.plans import GREEDY, SIZES, on


def perfect(first: float, second: float, dispatches: int = 50) -> Timeline:
    """Two stages that wait for each other alone."""
    spans, free = [], [0.0, 0.0]
    for dispatch in range(dispatches):
        there = 0.0
        for stage, seconds in enumerate((first, second)):
            start = max(there, free[stage])
            there = free[stage] = start + seconds
            spans.append(Span(stage, dispatch, True, start, there))
    return Timeline(2, spans)


def test_what_never_waits_is_busy_all_the_time():
    assert perfect(2.0, 2.0).busy() == pytest.approx([1.0, 1.0])
    assert perfect(2.0, 2.0).of_balanced() == pytest.approx([1.0, 1.0])


def test_the_faster_stage_waits_for_the_slower_and_is_busy_its_balanced_share():
    assert perfect(1.0, 2.0).busy()[1] == pytest.approx(1.0)
    assert perfect(4.0, 1.0).busy() == pytest.approx([1.0, 0.25], rel=0.05)
    assert perfect(4.0, 1.0).of_balanced() == pytest.approx([1.0, 1.0], rel=0.05)


def test_stages_that_take_turns_are_busy_half_the_time():
    spans = [
        Span(stage, i, True, 2.0 * i + stage, 2.0 * i + stage + 1) for i in range(50) for stage in range(2)
    ]
    assert Timeline(2, spans).of_balanced() == pytest.approx([0.5, 0.5], rel=0.05)


def test_a_run_without_decoding_has_no_share():
    spans = [Span(stage, 0, False, stage, stage + 1) for stage in range(2)]
    assert Timeline(2, spans).busy() == Timeline(2, spans).of_balanced() == []


def test_an_engine_tells_what_its_stages_did(tmp_path):
    engine = Engine(on("stage=2+1", oracle.tiny("mistral", 3)), None, SIZES)
    prompts = oracle.prompts(90, 5, 6, 7, 8)
    engine.generate(prompts, GREEDY)
    with engine.watched() as timeline:
        engine.generate(prompts, GREEDY)
    dispatches = {span.dispatch for span in timeline.spans}
    assert len(timeline.spans) == 2 * len(dispatches) and len(dispatches) > 2 * GREEDY.max_tokens - 2
    for stage in range(2):
        own = [span for span in timeline.spans if span.stage == stage]
        assert all(span.start <= span.end for span in own)
        assert all(one.end <= other.start for one, other in itertools.pairwise(own)), "one after another"
    ends = {(span.dispatch, span.stage): span.end for span in timeline.spans}
    assert all(span.start >= ends[span.dispatch, 0] for span in timeline.spans if span.stage == 1)
    assert len(timeline.busy()) == 2
    # Steps are as short as a thread takes to wake up, so that a share may come out as 0.
    assert 0 <= min(timeline.busy()) <= max(timeline.busy()) <= 1
    draw_schedule(timeline, tmp_path / "schedule.svg")
    assert "stage 1" in (tmp_path / "schedule.svg").read_text("utf-8")
    engine.generate(prompts, GREEDY)
    assert {span.dispatch for span in timeline.spans} == dispatches, "no longer watched"
