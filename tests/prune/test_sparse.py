"""Zeros among weights: against the papers' formulas, written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.calibrate import inverse_factor
from jaxopt_llm.prune import Sparsity
from jaxopt_llm.prune.sparse import magnitude, sparsegpt, wanda

RNG = np.random.default_rng(0)
OUT, IN, TOKENS = 24, 300, 400  # two whole blocks of columns and a part of one
W = RNG.standard_normal((OUT, IN)).astype(np.float32)
LATENT = (
    RNG.standard_normal((TOKENS, 60)) @ RNG.standard_normal((60, IN)) / 8
)  # what one feature loses, others hold
X = ((LATENT + 0.3 * RNG.standard_normal((TOKENS, IN))) * RNG.uniform(0.3, 3, IN)).astype(np.float32)
GRAM = X.T @ X
PATTERNS = ["0.5", "0.7", "2:4", "1:4", "4:6"]


def zeros_of(scores, sparsity):
    """Row by row, the lowest of it, or of every group in it."""
    gone = np.zeros(scores.shape, bool)
    width = sparsity.group or scores.shape[1]
    for row, values in enumerate(scores):
        for start in range(0, len(values), width):
            order = np.argsort(values[start : start + width], kind="stable")
            gone[row, start + order[: round(sparsity.share * width)]] = True
    return gone


def sparsegpt_in_float64(w, x, sparsity, block=128, damping=0.01):
    """Algorithm 1 of arXiv:2301.00774, line by line."""
    w, x = w.astype(np.float64).copy(), x.astype(np.float64)
    hessian = x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    mask = np.ones(w.shape, bool)
    block -= block % (sparsity.group or 1)
    for i in range(0, w.shape[1], block):
        end = min(i + block, w.shape[1])
        errors = np.zeros((len(w), end - i))
        for j in range(i, end):
            d = np.diag(inverse)
            if sparsity.group is None and j == i:
                cost = w[:, i:end] ** 2 / d[i:end] ** 2
                lowest = np.argsort(cost.reshape(-1))[: round(sparsity.share * cost.size)]
                mask[:, i:end].reshape(-1)[:] = True
                flat = np.ones(cost.size, bool)
                flat[lowest] = False
                mask[:, i:end] = flat.reshape(cost.shape)
            elif sparsity.group and j % sparsity.group == 0:
                own = slice(j, j + sparsity.group)
                mask[:, own] = ~zeros_of(w[:, own] ** 2 / d[own] ** 2, sparsity)
            errors[:, j - i] = np.where(mask[:, j], 0, w[:, j]) / d[j]
            w[:, j:end] -= np.outer(errors[:, j - i], inverse[j, j:end])
        w[:, end:] -= errors @ inverse[i:end, end:]
    return np.where(mask, w, 0)


def lost(sparse):
    """What the outputs change by, as a share of them."""
    x = X.astype(np.float64)
    return np.square(x @ (np.asarray(sparse, np.float64) - W).T).sum() / np.square(x @ W.T).sum()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_the_papers(pattern):
    sparsity = Sparsity.parse(pattern)
    norm = np.linalg.norm(X.astype(np.float64), axis=0)
    expected = np.where(zeros_of(np.abs(W) * norm, sparsity), 0, W)
    np.testing.assert_array_equal(wanda(jnp.asarray(W), jnp.asarray(norm, jnp.float32), sparsity), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_the_papers(pattern):
    sparsity = Sparsity.parse(pattern)
    expected = sparsegpt_in_float64(W, X, sparsity)
    found = np.asarray(sparsegpt(jnp.asarray(W), jnp.asarray(GRAM), sparsity))
    assert ((found == 0) == (expected == 0)).mean() > 0.999, "a tie may fall either way in float32"
    assert np.median(np.abs(found - expected)) < 1e-5
    assert lost(found) == pytest.approx(lost(expected), rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_updated_loses_less(pattern):
    sparsity = Sparsity.parse(pattern)
    norm = jnp.sqrt(jnp.diagonal(jnp.asarray(GRAM)))
    w = jnp.asarray(W)
    by_magnitude, by_wanda = lost(magnitude(w, sparsity)), lost(wanda(w, norm, sparsity))
    assert lost(sparsegpt(w, jnp.asarray(GRAM), sparsity)) < by_wanda < by_magnitude


def test_magnitude_takes_the_smallest_of_the_matrix():
    w = W * np.geomspace(1, 100, OUT, dtype=np.float32)[:, None]
    found = np.asarray(magnitude(jnp.asarray(w), Sparsity.parse(0.5)))
    assert (found == 0).sum() == w.size // 2
    assert np.abs(w[found == 0]).max() < np.abs(found[found != 0]).min()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_group_has_its_zeros(pattern):
    sparsity = Sparsity.parse(pattern)
    found = np.asarray(sparsegpt(jnp.asarray(W), jnp.asarray(GRAM), sparsity))
    if sparsity.group:
        zeros = (found.reshape(OUT, -1, sparsity.group) == 0).sum(-1)
        assert (zeros == round(sparsity.share * sparsity.group)).all()
    assert (found == 0).mean() == pytest.approx(sparsity.share, abs=1e-3)


def test_features_that_were_never_seen_cost_nothing():
    x = X.copy()
    x[:, 10:40] = 0
    found = np.asarray(sparsegpt(jnp.asarray(W), jnp.asarray(x.T @ x), Sparsity.parse("2:4")))
    assert np.isfinite(found).all()
    change = np.square(x @ (found - W).T).sum() / np.square(x @ W.T).sum()
    assert (
        change < lost(np.asarray(sparsegpt(jnp.asarray(W), jnp.asarray(GRAM), Sparsity.parse("2:4")))) * 1.2
    )


def test_the_factor_of_the_inverse():
    exact = GRAM.astype(np.float64) + 0.01 * np.diag(GRAM).mean() * np.eye(IN)
    u = np.asarray(inverse_factor(jnp.asarray(GRAM)), np.float64)
    assert np.abs(np.tril(u, -1)).max() == 0
    np.testing.assert_allclose(u.T @ u @ exact, np.eye(IN), atol=1e-3)


def test_more_damping_where_there_is_no_factor():
    indefinite = jnp.asarray([[1.0, 1.05], [1.05, 1.0]])
    u = inverse_factor(indefinite, 0.01)
    np.testing.assert_allclose(u.T @ u @ (indefinite + 0.1 * jnp.eye(2)), np.eye(2), atol=1e-4)
    with pytest.raises(ValueError, match=r"cannot be factorised even with damping=1\.0"):
        inverse_factor(jnp.full((2, 2), jnp.nan))
    with pytest.raises(ValueError, match="damping=0 must be above 0 and at most 1"):
        inverse_factor(indefinite, 0)


@pytest.mark.parametrize("value", ["4:4", "0:4", "5:4", "1.0", 0.0, 1.5, "-0.5", "half", "2:", "nan"])
def test_what_is_no_sparsity_is_refused(value):
    with pytest.raises(ValueError, match="sparsity='"):
        Sparsity.parse(value)
