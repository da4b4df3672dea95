"""GPTQ against a transcription of the paper in float64, and what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.calibrate import walk
from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import weights
from jaxopt_llm.quantize import AWQ, GPTQ, layerwise
from jaxopt_llm.quantize.clipping import grid
from jaxopt_llm.quantize.gptq import gptq

RANDOM = np.random.default_rng(0)
MIX = RANDOM.standard_normal((64, 64)) * np.exp(RANDOM.standard_normal(64))
X = RANDOM.standard_normal((300, 64)) @ MIX  # features of unlike size that depend on each other
W = RANDOM.standard_normal((24, 64))
FORMATS = ("int4_g32_zero", "int4_g32_min", "int3_g32_zero", "int8")


def array(values):
    return jnp.asarray(values, jnp.float32)


def reference(w, gram, scale, bias, limits, *, order, damping=0.01):
    """Algorithm 1 of arXiv:2210.17323 with fixed groups, one column at a time; values in place of codes."""
    w, out = w.astype(np.float64)[:, order], np.zeros(w.shape)
    per_column = lambda part: np.repeat(np.asarray(part, np.float64), w.shape[1] // scale.shape[1], axis=1)[
        :, order
    ]
    scale, bias = per_column(scale), 0 if bias is None else per_column(bias)
    hessian = 2 * gram[order][:, order]
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    u = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for j in range(w.shape[1]):
        offset, step = (0 if np.isscalar(bias) else bias[:, j]), scale[:, j]
        out[:, j] = np.clip(np.rint((w[:, j] - offset) / step), *limits) * step + offset
        w[:, j:] -= np.outer((w[:, j] - out[:, j]) / u[j, j], u[j, j:])
    return out[:, np.argsort(order)]


def loss(changed, gram):
    change = np.asarray(changed, np.float64) - W
    return float(np.sum(change @ gram * change))


@pytest.mark.parametrize(
    ("name", "act_order"), [*((name, True) for name in FORMATS), ("int4_g32_zero", False)]
)
def test_it_is_the_papers_algorithm(name, act_order):
    form, gram = quantization_format(name), X.T @ X
    found = gptq(array(W), array(gram), form, act_order=act_order, clip=False)
    order = np.argsort(-np.diag(gram)) if act_order else np.arange(64)
    scale, bias = grid(array(W), array(gram), format=form, clip=False)
    exact = reference(W, gram, scale, bias, form.limits, order=order)
    same = np.isclose(found.dequantize(), exact, rtol=0, atol=1e-3 * float(np.max(scale)))
    assert same.mean() > 0.995, "a value in the middle between two codes may go either way"
    assert loss(found.dequantize(), gram) == pytest.approx(loss(exact, gram), rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_change_less_than_by_rounding_to_nearest(name):
    form, gram = quantization_format(name), X.T @ X
    nearest = loss(form.quantize(array(W)).dequantize(), gram)
    assert loss(gptq(array(W), array(gram), form).dequantize(), gram) < 0.5 * nearest


def test_scales_are_those_of_clipped_groups_in_their_places():
    form, gram = quantization_format("int3_g32_zero"), array(X.T @ X)
    found, (scale, bias) = gptq(array(W), gram, form), grid(array(W), gram, format=form, clip=True)
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.bias, bias)
    assert (np.asarray(scale) <= np.asarray(form.quantize(array(W)).scale)).all()


def test_features_never_seen_are_rounded_to_nearest():
    form, unseen = quantization_format("int4_g32_zero"), [3, 40]
    x = X.copy()
    x[:, unseen] = 0
    found = gptq(array(W), array(x.T @ x), form, clip=False)
    nearest = form.quantize(array(W))
    np.testing.assert_array_equal(found.codes()[:, unseen], nearest.codes()[:, unseen])
    assert np.isfinite(found.dequantize()).all()


def test_damping_grows_until_the_moments_can_be_factorised():
    """Correlations beyond one: the smallest eigenvalue is about -0.05 of the mean."""
    gram = np.full((64, 64), 1.05) - 0.05 * np.eye(64)
    assert -0.1 < np.linalg.eigvalsh(gram).min() < -0.04
    form = quantization_format("int4_g32_zero")
    small, larger = (gptq(array(W), array(gram), form, damping=damping) for damping in (0.01, 0.1))
    np.testing.assert_array_equal(small.data, larger.data)
    with pytest.raises(ValueError, match=r"second moments cannot be factorised even with damping=1\.0"):
        gptq(array(W), array(gram * np.nan), form)


def test_what_the_methods_leave_is_rounded_to_nearest(model, ids):
    methods = [AWQ(format="int4_g32_zero", round=False), GPTQ(format="int4_g32_zero")]
    rounded = layerwise(model, ids, methods)
    bits = {name: value.bits for name, value in weights(rounded).items() if isinstance(value, QArray)}
    matrices = {name for name, value in weights(model).items() if value.ndim == 2}
    assert bits == {name: 8 if name == "embed.weight" else 4 for name in matrices}
    kept = layerwise(model, ids, methods, rest=None)
    np.testing.assert_array_equal(weights(kept)["embed.weight"], weights(model)["embed.weight"])
    with pytest.raises(ValueError, match="unknown quantization 'int5'"):
        layerwise(model, ids, methods, rest="int5")


def test_bad_settings_are_refused(model, ids):
    with pytest.raises(ValueError, match="unknown quantization 'int5'"):
        GPTQ(format="int5")
    with pytest.raises(ValueError, match=r"damping=0 must be above 0 and at most 1\.0"):
        GPTQ(damping=0)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.q\.weight has 32 input features, which groups of 64"
    ):
        walk(model, ids, [GPTQ(format="int4_g64_zero")])
