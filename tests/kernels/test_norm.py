"""The norm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_llm.kernels import rms_norm


def test_rms_norm():
    x = jax.random.normal(jax.random.key(0), (3, 5, 17)) * 30
    gain = jnp.linspace(-1, 2, 17)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(gain, np.float64)
    np.testing.assert_allclose(rms_norm(x, gain, eps=1e-5), expected, atol=1e-6)
    assert rms_norm(x.astype(jnp.bfloat16), gain, eps=1e-5).dtype == jnp.bfloat16
