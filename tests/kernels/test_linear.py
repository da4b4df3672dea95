"""Products with quantized weights against float64 NumPy on the values they stand for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxopt_llm.kernels import FORMATS, QArray, embed, linear, quantization_format, round_symmetric

NAMES = [*FORMATS, "int8_g32_zero", "int4_g64_zero", "int3_g32_min", "int3_g64"]


def weight(outputs=24, features=64, seed=0):
    return jax.random.normal(jax.random.key(seed), (outputs, features)) * 0.3


def packed(seed=0, bias=True):
    """A 4-bit weight in groups of 16, and its values in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (24, 64))
    scale, offset = rng.uniform(0.01, 0.1, (2, 24, 4)).astype(np.float32)
    data = jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4, jnp.uint8)
    signed = codes if bias else np.where(codes > 7, codes - 16, codes)
    values = signed * np.repeat(scale, 16, 1).astype(np.float64) + bias * np.repeat(offset, 16, 1)
    return QArray(data, jnp.asarray(scale), jnp.asarray(offset) if bias else None, bits=4), values


@pytest.mark.parametrize("bias", [True, False])
def test_four_bit_values(bias):
    w, values = packed(bias=bias)
    assert w.shape == (24, 64)
    assert w.group == 16
    np.testing.assert_allclose(w.dequantize(), values, rtol=1e-6)
    np.testing.assert_allclose(w[3:5].dequantize(), values[3:5], rtol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 3, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_linear(name, shape):
    w = quantization_format(name).quantize(weight())
    x = jax.random.normal(jax.random.key(1), shape)
    rounded = np.asarray(x, np.float64)
    if w.act:
        groups = rounded.reshape(*shape[:-1], -1, w.act[1] or 64)
        step = np.abs(groups).max(-1, keepdims=True) / 127
        rounded = (np.round(groups / step) * step).reshape(shape)
    expected = rounded @ np.asarray(w.dequantize(), np.float64).T
    np.testing.assert_allclose(linear(x, w), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_result_has_the_activations_dtype(name, dtype):
    w = quantization_format(name).quantize(weight()) if name else weight()
    x = jax.random.normal(jax.random.key(1), (3, 64)).astype(dtype)
    y = linear(x, w)
    assert y.dtype == dtype
    full = linear(x.astype(jnp.float32), w)
    np.testing.assert_allclose(y.astype(jnp.float32), full, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NAMES)
def test_long_sums_of_codes_fit_narrow_floats(name, dtype):
    """Sums over 4096 codes reach 500,000, where float16 ends at 65,504; the products themselves are small."""
    w = quantization_format(name).quantize(0.01 + 0.001 * weight(features=4096))
    x = (1 + 0.1 * jax.random.normal(jax.random.key(1), (2, 4096))).astype(dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    np.testing.assert_allclose(linear(x, w).astype(jnp.float32), expected, rtol=0.01)


def test_gradient_reaches_activations_straight_through():
    w = FORMATS["int8_block"].quantize(weight())
    x, dy = jax.random.normal(jax.random.key(1), (5, 64)), jax.random.normal(jax.random.key(2), (5, 24))
    _, pull = jax.vjp(linear, x, w)
    dx, dw = pull(dy)
    np.testing.assert_allclose(
        dx, np.asarray(dy, np.float64) @ np.asarray(w.dequantize(), np.float64), atol=1e-5
    )
    assert dw.data.dtype == jax.dtypes.float0
    assert not dw.scale.any()


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounding_is_to_nearest(xp, scale_dtype):
    """No value lies more than half a step off, except by what clipping at a scale rounded down costs."""
    x = xp.asarray(np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32))
    codes, scale = round_symmetric(x, bits=8, group=32, scale_dtype=scale_dtype)
    assert type(codes) is type(x)
    assert codes.dtype == np.int8
    step = np.repeat(np.asarray(scale, np.float64), 32, 1)
    error = np.abs(np.asarray(codes, np.float64) * step - np.asarray(x, np.float64))
    lost = float(ml_dtypes.finfo(scale_dtype).eps) * 127  # steps
    assert (error <= step * (0.5 + lost)).all()
    assert (np.abs(np.asarray(codes)).reshape(7, 3, 32).max(-1) >= 126).all()


def test_zero_rows_stay_zero():
    codes, scale = round_symmetric(np.zeros((2, 32), np.float32), bits=8, group=32)
    assert not codes.any()
    assert not scale.any()


def test_embed_reads_rows():
    w = FORMATS["int8"].quantize(weight())
    ids = jnp.asarray([[3, 0], [23, 3]])
    np.testing.assert_array_equal(embed(ids, w, jnp.float32), np.asarray(w.dequantize())[ids])


def test_wrong_inner_dimension_is_refused():
    with pytest.raises(ValueError, match="63 input features but w has 64"):
        linear(jnp.zeros((2, 63)), weight())
