"""The clock against a device that is played: what it tells is what was, whatever the host does meanwhile."""

from collections import deque

import numpy as np
import pytest

from jaxopt_llm.engine.clock import Clock


def play(pauses):
    """(what the device took, what the clock told) of dispatches with such pauses before each; the clock."""
    rng, clock = np.random.default_rng(0), Clock()
    now = free = 0.0
    flight, told = deque(), []
    for pause in pauses:
        now += pause
        took = rng.uniform(1, 3)
        free = max(now, free) + took
        flight.append((now, took, free))
        if len(flight) == 2:
            sent, took, end = flight.popleft()
            waited, now = end > now, max(now, end)
            told.append((took, clock.over(sent, now, waited=waited)))
    return told, clock


def test_a_host_that_waits_sees_all():
    told, clock = play([0.1] * 50)
    for took, seconds in told:
        assert seconds == pytest.approx(took)
    assert clock.worked == pytest.approx(sum(took for took, _ in told))


def test_pauses_count_as_nothing():
    told, clock = play(
        np.random.default_rng(1).choice([0.1, 0.5, 2.5, 40.0], 400, p=[0.5, 0.2, 0.15, 0.15]).tolist()
    )
    known = [(took, seconds) for took, seconds in told if seconds is not None]
    assert 100 < len(known) < 350
    for took, seconds in known:
        assert seconds == pytest.approx(took)
    assert sum(took for took, _ in known) <= clock.worked * (1 + 1e-9)
    assert clock.worked <= sum(took for took, _ in told)
