"""Rounding formats: their grids, error bounds in float64, bytes, and codes of 3 and 4 bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm.kernels import FORMATS, QArray, linear, quantization_format
from jaxopt_llm.kernels.codes import pack_codes, unpack_codes
from jaxopt_llm.kernels.linear import sum_as_floats, sum_as_integers

GROUPED = [
    f"int{bits}_g{group}{offset}"
    for bits, group, offset in itertools.product((8, 4, 3), (32, 64, 128), ("", "_sym", "_zero", "_min"))
]
NAMES = [*FORMATS, *GROUPED]
FEW = [*FORMATS, "int8_g32_zero", "int4_g64_zero", "int3_g128_min", "int3_g32"]


def weight(outputs=24, features=256, seed=0):
    return np.random.default_rng(seed).normal(size=(outputs, features)).astype(np.float32) * 0.3


@given(st.integers(3, 4), st.lists(st.integers(0, 255), min_size=16, max_size=16), st.booleans())
def test_codes_survive_packing(bits, numbers, signed):
    codes = np.array(numbers, np.uint8).reshape(2, 8) % 2**bits
    expected = codes.astype(np.int8) - (2**bits * (codes >= 2 ** (bits - 1)) if signed else 0)
    packed = pack_codes(expected.astype(np.int8), bits)
    assert packed.shape == (2, bits)
    np.testing.assert_array_equal(unpack_codes(packed, bits, signed=signed), expected)
    np.testing.assert_array_equal(pack_codes(jnp.asarray(expected, jnp.int8), bits), packed)
    np.testing.assert_array_equal(unpack_codes(jnp.asarray(packed), bits, signed=signed), expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_packed_bits_lie_without_a_gap_from_the_lowest_up(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64)).astype(np.int8)
    stream = np.unpackbits(pack_codes(codes, bits), axis=-1, bitorder="little").reshape(5, 64, bits)
    np.testing.assert_array_equal(stream @ (1 << np.arange(bits)), codes)


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_off_by_more_than_half_a_step(name):
    """Except by what clipping costs where a scale was rounded down, or an integer zero moved the grid."""
    w, chosen = weight(), quantization_format(name)
    q = chosen.quantize(w)
    exact, values = w.astype(np.float64), np.asarray(q.dequantize(), np.float64)
    step = np.repeat(np.asarray(q.scale, np.float64), q.group, 1)
    if chosen.floating:  # 4 significant bits, and below 2**-6 a fixed step
        bound = np.maximum(np.abs(exact) * 2**-4, step * 2**-10)
    else:
        levels = chosen.limits[1] - chosen.limits[0]
        precision = 2.0**-7 if chosen.offset == "zero" else 2.0**-11
        bound = step * (0.5 + levels * precision + 0.5 * (chosen.offset == "zero"))
        inside = np.abs(exact - values) <= step * 0.5001
        assert inside.mean() > 0.9
    assert (np.abs(values - exact) <= bound * 1.0001).all()


@pytest.mark.parametrize("name", [name for name in GROUPED if name.endswith("_zero")])
def test_zero_is_a_code(name):
    """The bias is a whole number of steps, exactly, at any magnitude: zero itself is among the values."""
    w = weight() * 10.0 ** np.random.default_rng(1).integers(-8, 3, (24, 1)).astype(np.float32)
    w[:, :4] = 0
    q = quantization_format(name).quantize(w)
    scale, bias = np.asarray(q.scale, np.float64), np.asarray(q.bias, np.float64)
    zero = np.round(-bias / np.where(scale == 0, 1, scale))
    np.testing.assert_array_equal(-zero * scale, bias)
    least, most = quantization_format(name).limits
    assert least <= zero.min()
    assert zero.max() <= most
    assert not np.asarray(q.dequantize())[:, :4].any()


def test_groups_on_one_side_of_zero_keep_their_values():
    w = np.abs(weight()) + 1
    for name in ("int4_g64_zero", "int8_g32_zero"):
        q = quantization_format(name).quantize(w)
        assert (abs(np.asarray(q.dequantize()) - w) <= np.repeat(q.scale, q.group, 1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_codes_and_scales(name):
    w, chosen = weight(), quantization_format(name)
    q = chosen.quantize(w)
    per_scale = {"float16": 2, "float32": 4}[chosen.scale_dtype] * (1 if chosen.offset is None else 2)
    scales = 24 * 256 // (chosen.group or 256)
    assert q.nbytes == 24 * 256 * chosen.bits // 8 + scales * per_scale
    assert jax.tree.map(lambda a: (a.shape, a.dtype), q) == jax.tree.map(
        lambda a: (a.shape, a.dtype), chosen.shapes(w.shape)
    )


@pytest.mark.parametrize("name", FEW)
def test_the_host_rounds_as_a_device_does(name):
    host, device = (quantization_format(name).quantize(w) for w in (weight(), jnp.asarray(weight())))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    assert [leaf.dtype for leaf in jax.tree.leaves(host)] == [leaf.dtype for leaf in jax.tree.leaves(device)]
    same = np.isclose(host.dequantize(), device.dequantize(), rtol=1e-6)
    assert same.mean() > 0.99, "but for ties: XLA multiplies by what NumPy divides by"


@pytest.mark.parametrize("name", FEW)
def test_what_was_rounded_is_a_fixed_point_of_its_grid(name):
    chosen = quantization_format(name)
    q = chosen.quantize(weight())
    spread = lambda a: None if a is None else np.repeat(a, q.group, 1)
    codes = chosen.encode(q.dequantize(), spread(q.scale), spread(q.bias))
    np.testing.assert_array_equal(codes, q.codes())
    jax.tree.map(np.testing.assert_array_equal, chosen.assemble(codes, q.scale, q.bias), q)


def test_finer_formats_lose_less():
    """In the order of their bits; within 4 bits a minimum or a zero beats symmetry on values that lean to a side."""
    lost = lambda name: np.square(quantization_format(name).quantize(leaning).dequantize() - leaning).mean()
    leaning = weight() + 0.2
    assert lost("int8_g32") < lost("int8_g128") < lost("int4_g32_min") < lost("int4_g128_min")
    assert lost("int4_g64_min") < lost("int4_g64_zero") < lost("int4_g64_sym") < lost("int3_g64_sym")


@pytest.mark.parametrize("name", FEW)
def test_gradients_reach_activations(name):
    w = quantization_format(name).quantize(jnp.asarray(weight()))
    x, dy = jnp.asarray(weight(5, 256, 1)), jnp.asarray(weight(5, 24, 2))
    _, pull = jax.vjp(linear, x, w)
    dx, _ = pull(dy)
    expected = np.asarray(dy, np.float64) @ np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(dx, expected, atol=1e-5)


def test_sums_of_integers_are_those_of_floats():
    """Up to where float32 counts by ones: the units that a platform has do not decide the result."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-127, 128, (rows, 1040)), jnp.int8) for rows in (3, 5))
    np.testing.assert_array_equal(sum_as_integers(x, w), sum_as_floats(x, w))
    assert linear(jnp.ones((2, 64)), QArray(w[:, :64], jnp.ones((5, 1)), act=(8, None))).shape == (2, 5)


@pytest.mark.parametrize("name", ["int7", "int4_g48", "int5_g32", "int4_g32_max", "int8_g32_"])
def test_unknown_names_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"unknown quantization '{name}'; known are int8.*fp8, and int{{8,4,3}}"
    ):
        quantization_format(name)


def test_a_weight_is_no_sequence_of_weights():
    with pytest.raises(TypeError, match="not iterable"):
        iter(quantization_format("int8").quantize(jnp.ones((4, 32))))
