"""Rotary position embedding: frequencies, their scalings, and the turn itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position, float32 `[head_dim / 2]`."""
    scale = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.kind]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return scale(rope, 1 / (np.float32(rope.theta) ** exponents), head_dim).astype(np.float32)


def _default(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    return plain


def _linear(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    return plain / np.float32(rope.factor)


def _llama3(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1's release)."""
    assert rope.original_max_seq_len
    rotations = rope.original_max_seq_len * plain.astype(np.float64) / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv:2309.00071, section 3.2)."""
    assert rope.original_max_seq_len
    context = rope.original_max_seq_len

    def dimension(rotations: float) -> float:  # the one that makes so many rotations over the old context
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def amplitude(rope: Rope) -> float:
    """Factor on cosine and sine: yarn's attention temperature, else 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "T"]) -> Float[Array, "2 T 1 half"]:
    """Cosine and sine of each position's angles."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies(rope, head_dim)[None, :]
    turn = amplitude(rope) * jnp.stack([jnp.cos(angles), jnp.sin(angles)])[:, :, None, :]
    return jax.lax.optimization_barrier(turn)  # else XLA computes them anew in each layer


def rotate(x: Float[Array, "T heads H"], turn: Float[Array, "2 T 1 half"]) -> Float[Array, "T heads H"]:
    """Turns the pairs (i, i + H/2), the half-split order of Hugging Face checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = turn
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
