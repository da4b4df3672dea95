"""Errors of figures over windows: against SciPy's Student's t, and by how often an interval holds the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxopt_llm.evaluate.estimate import Estimate


def test_windows_of_one_length_give_the_usual_interval_of_a_mean():
    means = np.random.default_rng(0).normal(3, 0.5, size=7)
    found = Estimate.ratio(means * 64, np.full(7, 64))
    sem = stats.sem(means)
    assert found.value == pytest.approx(means.mean())
    assert found.stderr == pytest.approx(sem)
    assert found.interval == pytest.approx(stats.t.interval(0.95, df=6, loc=means.mean(), scale=sem))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Windows of unequal lengths, the tokens of one alike: an error over tokens would hold it half as often."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        sizes = rng.integers(40, 65, size=12)
        sums = [size * rng.normal(2, 0.3) + rng.normal(0, 1, size=size).sum() for size in sizes]
        low, high = Estimate.ratio(np.array(sums), sizes).interval
        held += low <= 2 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_window_has_no_error():
    found = Estimate.ratio(np.array([6.0]), np.array([3]))
    assert (found.value, found.stderr, found.interval) == (2.0, None, None)
    assert (found.exp().value, found.exp().interval) == (math.exp(2), None)
    assert found.within(0, 1) == found


def test_an_interval_keeps_to_what_is_possible_and_follows_the_exponential():
    found = Estimate.ratio(np.array([0.0, 2.0]), np.array([2, 2]))
    reach = 0.5 * stats.t.ppf(0.975, df=1)
    assert found.interval == pytest.approx((0.5 - reach, 0.5 + reach))
    assert found.within(0, 1).interval == (0, 1)
    assert found.exp().interval == pytest.approx((math.exp(0.5 - reach), math.exp(0.5 + reach)))
    assert found.exp().stderr == pytest.approx(math.exp(0.5) * 0.5)
