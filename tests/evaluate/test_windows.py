"""Cutting a text: against the sliding window that transformers documents, and by what must always hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm.evaluate.windows import cut

SIZES = st.integers(2, 12).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window)))


def targets(plan):
    return np.concatenate(plan.window_targets).tolist()


def documented(n, window, stride):
    """(start of window, token predicted), by the loop on transformers' page "Perplexity of fixed-length models"."""
    pairs, scored_up_to = [], 0
    for begin in range(0, n, stride):
        end = min(begin + window, n)
        labels = range(scored_up_to, end)
        pairs += [(begin, label) for label in labels if label > begin]  # the shift drops a window's first
        scored_up_to = end
        if end == n:
            break
    return pairs


@given(st.integers(2, 60), SIZES)
def test_tokens_count_as_documented(n, sizes):
    window, stride = sizes
    plan = cut(range(n), window=window, stride=stride)
    found = [(row * stride, row * stride + at + 1) for row, at in np.argwhere(plan.scored).tolist()]
    assert found == documented(n, window, stride)
    assert targets(plan) == [target for _, target in found]
    assert plan.scored.any(axis=1).all(), "a window for nothing"


@given(st.integers(2, 60), SIZES)
def test_overlapping_windows_count_every_token_but_the_first_once(n, sizes):
    window, stride = sizes
    if stride < window:
        assert targets(cut(range(n), window=window, stride=stride)) == list(range(1, n))


def test_windows_do_not_overlap_unless_asked():
    plan = cut(range(10, 21), window=4)
    assert plan.tokens.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 0]]
    assert targets(plan) == [11, 12, 13, 15, 16, 17, 19, 20]


def test_the_first_windows():
    assert cut(range(100), window=8, windows=3).tokens.shape == (3, 8)
    assert cut(range(9), window=8, windows=3).tokens.shape == (1, 8), "the ninth token has nothing to predict"


def test_bos_takes_the_place_of_first_tokens():
    plan = cut(range(10, 18), window=4, bos=1)
    assert plan.tokens.tolist() == [[1, 11, 12, 13], [1, 15, 16, 17]]
    assert targets(plan) == [11, 12, 13, 15, 16, 17]


@pytest.mark.parametrize(
    ("n", "sizes", "message"),
    [
        (9, {"window": 1}, "window=1 must be at least 2"),
        (9, {"window": 4, "stride": 5}, "stride=5 must be at least 1 and at most window=4"),
        (9, {"window": 4, "stride": 0}, "stride=0 must be at least 1"),
        (9, {"window": 4, "windows": 0}, "windows=0 must be at least 1"),
        (1, {"window": 4}, "the text has 1 tokens; at least 2"),
        (0, {"window": 4}, "the text has 0 tokens"),
    ],
)
def test_sizes_that_cut_nothing_are_refused(n, sizes, message):
    with pytest.raises(ValueError) as caught:
        cut(range(n), **sizes)
    assert message in str(caught.value)
