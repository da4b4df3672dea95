"""Root-mean-square normalisation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxopt_llm.kernels.cpu import normalise


def rms_norm(
    x: Float[Array, "*B D"], gain: Float[Array, "D"], *, eps: float, kernel: bool = False
) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x**2) + eps) * gain` (arXiv:1910.07467), computed in float32, in the dtype of `x`.

    With `kernel` the platform's own kernel runs where there is one (CPU; width a multiple of 16): XLA sums a
    row in another order beside other rows, the kernel does not. No gradients; for programs of one device and
    the body of a `shard_map`.
    """
    plain = functools.partial(_rms_norm, eps=eps)
    if not kernel or not normalise.fits(x):
        return plain(x, gain)
    fast = functools.partial(normalise.normalise, eps=eps)
    return jax.lax.platform_dependent(x, gain, cpu=fast, default=plain)


def _rms_norm(x: Float[Array, "*B D"], gain: Float[Array, "D"], *, eps: float) -> Float[Array, "*B D"]:
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normal * per_feature(gain.astype(jnp.float32), x)).astype(x.dtype)


def per_feature(values: Shaped[Array, "D"], x: Shaped[Array, "*B D"]) -> Shaped[Array, "*ones D"]:
    """Values of the last axis of `x` in a shape that broadcasts against it (ranks are never promoted in silence)."""
    return values.reshape((1,) * (x.ndim - 1) + values.shape)
