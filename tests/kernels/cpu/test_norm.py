"""The CPU norm against float64 NumPy, on every instruction set that this machine can run."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import rms_norm
from jaxopt_llm.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="the library was not built: no C++ compiler")
ISAS = library.supported() if library.load() else []


@pytest.fixture(params=ISAS)
def isa(request):
    library.configure(isa=request.param)
    yield request.param
    library.configure(isa=ISAS[0])


@pytest.mark.parametrize("width", [16, 80, 576, 4096])
def test_rows_do_not_see_each_other(width, isa):
    rng = np.random.default_rng(0)
    x, gain = rng.normal(size=(70, width)).astype(np.float32), rng.normal(size=width).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    whole = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(gain), eps=1e-5, kernel=True))
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    for rows in (1, 2, 3, 7, 64):
        part = rms_norm(jnp.asarray(x[:rows]), jnp.asarray(gain), eps=1e-5, kernel=True)
        np.testing.assert_array_equal(part, whole[:rows])


def test_heads_in_half_precision(isa):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 64)), jnp.bfloat16)
    gain = jnp.linspace(0.5, 2, 64)
    ours, theirs = (rms_norm(x, gain, eps=1e-5, kernel=kernel) for kernel in (True, False))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2**-8)


def test_what_the_kernel_does_not_know():
    x = jnp.ones((3, 10))
    np.testing.assert_allclose(rms_norm(x, jnp.ones(10), eps=0.0, kernel=True), x)
