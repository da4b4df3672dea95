"""Rope scalings against their papers' formulas, and the turn against complex numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.models import Rope
from jaxopt_llm.models.rope import amplitude, frequencies, rotate, rotation

PLAIN = 500000.0 ** (-np.arange(0, 64, 2) / 64)


def test_default_and_linear():
    np.testing.assert_allclose(frequencies(Rope(theta=500000.0), 64), PLAIN, rtol=1e-6)
    stretched = frequencies(Rope(theta=500000.0, kind="linear", factor=8.0), 64)
    np.testing.assert_allclose(stretched, PLAIN / 8, rtol=1e-6)


def test_llama3_by_wavelength():
    """Meta's release: by wavelength, kept under context/high, stretched over context/low, blended between."""
    rope = Rope(theta=500000.0, kind="llama3", factor=8.0, original_max_seq_len=8192)
    expected = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(frequencies(rope, 64), expected, rtol=1e-6)


def test_yarn_keeps_the_fast_and_stretches_the_slow():
    rope = Rope(theta=500000.0, kind="yarn", factor=16.0, original_max_seq_len=4096)
    scaled = frequencies(rope, 64)
    rotations = 4096 * PLAIN / (2 * math.pi)
    np.testing.assert_allclose(scaled[rotations > 40], PLAIN[rotations > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[rotations < 0.5], PLAIN[rotations < 0.5] / 16, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()
    assert amplitude(rope) == pytest.approx(0.1 * math.log(16) + 1)


def test_rotation_is_multiplication_by_a_complex_unit():
    positions = jnp.asarray([0, 1, 77, 3000])
    x = jax.random.normal(jax.random.key(0), (4, 3, 64))
    turned = rotate(x, rotation(Rope(theta=500000.0), 64, positions))
    pairs = np.asarray(x[..., :32], np.float64) + 1j * np.asarray(x[..., 32:], np.float64)
    expected = pairs * np.exp(1j * np.asarray(positions)[:, None, None] * PLAIN)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=2e-3)
    np.testing.assert_allclose(turned[:3], np.concatenate([expected.real, expected.imag], -1)[:3], atol=5e-5)
