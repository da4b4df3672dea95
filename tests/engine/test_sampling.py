"""Sampling against the papers' definitions written out in NumPy, and against frequencies."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxopt_llm.engine import SamplingParams
from jaxopt_llm.engine.sampling import RowSampling, keep_likely, penalize, sample

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40)) * 2, jnp.float32)


def stack(params):
    return RowSampling.stack(params, [one.seed or 0 for one in params])


def kept(**settings):
    return np.asarray(keep_likely(LOGITS, stack([SamplingParams(**settings)]))[0] > -math.inf)


def probabilities():
    exponentials = np.exp(np.asarray(LOGITS[0], np.float64))
    return exponentials / exponentials.sum()


@pytest.mark.parametrize("k", [1, 5, 40, 1000, 2**31, 9_999_999_999])
def test_top_k(k):
    assert set(np.flatnonzero(kept(top_k=k))) == set(np.argsort(-LOGITS[0])[:k].tolist())


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
def test_top_p_is_the_smallest_set_that_reaches_p(p):
    probs, chosen = probabilities(), kept(top_p=p)
    assert probs[chosen].sum() >= p - 1e-6
    weakest = np.where(chosen, probs, np.inf).argmin()
    if chosen.sum() > 1 and p < 1:
        assert probs[chosen].sum() - probs[weakest] < p
    assert probs[chosen].min() >= probs[~chosen].max(initial=0)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p(p):
    probs = probabilities()
    np.testing.assert_array_equal(kept(min_p=p), probs >= p * probs.max() * (1 - 1e-6))


def test_top_p_acts_on_what_top_k_left():
    probs = np.sort(probabilities())[::-1][:4]
    count = int(np.searchsorted(np.cumsum(probs / probs.sum()), 0.8) + 1)
    assert kept(top_k=4, top_p=0.8).sum() == count


def test_draws_follow_the_tempered_distribution():
    draws = 4000
    slots = stack([SamplingParams(temperature=0.7, top_k=8, seed=3)])
    many = jax.jit(jax.vmap(lambda position: sample(LOGITS, slots, position[None])[0]))
    counts = np.bincount(many(jnp.arange(draws)), minlength=40)
    tempered = np.exp(np.asarray(LOGITS[0], np.float64) / 0.7)
    best = np.argsort(-tempered)[:8]
    assert counts.sum() == counts[best].sum()
    expected = tempered[best] / tempered[best].sum() * draws
    assert stats.chisquare(counts[best], expected).pvalue > 1e-3


def test_neighbours_change_nothing():
    """A slot's token depends on its own settings, seed and position alone."""
    params = [
        SamplingParams(temperature=t, seed=s, top_p=p) for t, s, p in [(0, 1, 1), (1, 2, 0.9), (2, 2, 1)]
    ]
    logits, positions = jnp.tile(LOGITS, (3, 1)), jnp.asarray([5, 6, 7])
    together = sample(logits, stack(params), positions)
    for i, one in enumerate(params):
        alone = sample(LOGITS, stack([one]), positions[i : i + 1])
        assert alone[0] == together[i]


def test_penalties():
    settings = SamplingParams(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2)
    logits = jnp.asarray([[2.0, -2.0, 1.0, -1.0, 0.5]])
    seen = jnp.asarray([[True, True, False, False, False]])
    counts = jnp.asarray([[0, 0, 2, 1, 0]])
    out = penalize(logits, seen, counts, stack([settings]))
    np.testing.assert_allclose(out[0], [2 / 1.5, -3.0, 1 / 1.5 - 0.3 - 0.4, -1.5 - 0.3 - 0.2, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("logprobs", -1),
        ("logprobs", 101),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", None),
        ("top_k", 1.5),
        ("temperature", "1"),
        ("temperature", 10**400),
        ("temperature", None),
        ("top_p", True),
        ("presence_penalty", 1e39),
        ("frequency_penalty", -1e39),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", np.nan),
        ("seed", 1.5),
        ("seed", "7"),
        ("seed", -1),
        ("seed", 2**32),
        ("logit_bias", [3]),
        ("logit_bias", []),
        ("logprobs", 1.5),
        ("logprobs", False),
        ("ignore_eos", "no"),
        ("ignore_eos", 0),
        ("stop", [1]),
        ("stop", ["a", ""]),
        ("stop", b"END"),
        ("stop", None),
    ],
)
def test_bad_settings_name_the_value(field, value, unchecked):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} must be ")):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("bias", [{True: 1.0}, {1: True}, {"1": 1.0}, {1: None}, {1: math.nan}, {1: 1e39}])
def test_biases_map_tokens_to_numbers(bias, unchecked):
    with pytest.raises(
        ValueError, match=re.escape(f"logit_bias={bias!r} must map token ids to finite float32")
    ):
        SamplingParams(logit_bias=bias)


def test_stop_takes_one_string_or_several():
    assert SamplingParams(stop="END").stop == ("END",)
    assert dataclasses.replace(SamplingParams(), stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", np.int64(3)), ("temperature", 1), ("top_p", np.float32(0.5))]
)
def test_numbers_of_numpy_and_whole_floats_will_do(field, value, unchecked):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_seeds_are_kept_whole(seed):
    assert RowSampling.stack([SamplingParams(seed=seed)], [seed]).seed.tolist() == [seed]


def test_filters_leave_alone_who_has_none():
    """Tokens so unlikely that float32 loses them beside 1 stay, though a neighbour's filter sums probabilities."""
    logits = jnp.asarray([[0.0, *[-20.0] * 9]] * 2)
    rows = RowSampling.stack([SamplingParams(), SamplingParams(top_p=0.9)], [0, 0])
    kept = jnp.isfinite(keep_likely(logits, rows)).sum(-1)
    assert kept.tolist() == [10, 1]


def test_the_largest_settings_give_no_nan():
    """The penalties that float32 just holds, twice over."""
    most = float(np.finfo(np.float32).max)
    settings = SamplingParams(
        presence_penalty=most, frequency_penalty=most, repetition_penalty=most, temperature=most, min_p=0.5
    )
    logits, seen = jnp.asarray([[2.0, -2.0, 1.0, -1.0, 0.5]]), jnp.zeros((1, 5), bool)
    slots = RowSampling.stack([settings], [0])
    out = penalize(logits, seen, jnp.asarray([[0, 0, 2, 3, 0]]), slots)
    assert not jnp.isnan(out).any()
    assert int(sample(out, slots, jnp.asarray([0]))[0]) in {0, 1, 4}
