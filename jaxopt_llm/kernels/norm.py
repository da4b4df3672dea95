"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*B D"], gain: Float[Array, "D"], *, eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x**2) + eps) * gain` (arXiv:1910.07467), computed in float32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normal * gain.astype(jnp.float32)).astype(x.dtype)
