"""Codes of fewer than 8 bits, as many as fill whole bytes packed together."""

import functools
import operator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped, UInt8

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

_UNITS = {4: (2, 1), 3: (8, 3)}  # so many codes fill so many bytes


def array_module(array: Any) -> Any:
    """`jax.numpy` for JAX arrays, NumPy for its own."""
    return jnp if isinstance(array, jax.Array) else np


def pack_codes(codes: Int[AnyArray, "... I"], bits: int) -> UInt8[AnyArray, "... bytes"]:
    """The low `bits`, 4 or 3, of each code, without a gap from the lowest bit of the first byte up.

    So 4-bit codes lie two in a byte, the even one in the low nibble, and 3-bit codes eight in three bytes.
    """
    xp, (count, nbytes) = array_module(codes), _UNITS[bits]
    *rows, width = codes.shape
    units = (codes.astype(_word(nbytes)) & 2**bits - 1).reshape(*rows, width // count, count)
    word = _either(units[..., j] << bits * j for j in range(count))
    parts = [(word >> 8 * k & 0xFF).astype(jnp.uint8) for k in range(nbytes)]
    return xp.stack(parts, axis=-1).reshape(*rows, width * bits // 8)


def unpack_codes(data: UInt8[AnyArray, "... bytes"], bits: int, *, signed: bool) -> Int[AnyArray, "... I"]:
    """What `pack_codes` packed, in int8: two's complement if `signed`, else from 0 up."""
    xp, (count, nbytes) = array_module(data), _UNITS[bits]
    *rows, width = data.shape
    units = data.reshape(*rows, width // nbytes, nbytes).astype(_word(nbytes))
    word = _either(units[..., k] << 8 * k for k in range(nbytes))
    parts = [(word >> bits * j & 2**bits - 1).astype(jnp.int8) for j in range(count)]
    codes = xp.stack(parts, axis=-1).reshape(*rows, width * 8 // bits)
    half = 2 ** (bits - 1)
    return (codes ^ half) - half if signed else codes


def _word(nbytes: int) -> Any:
    return jnp.uint8 if nbytes == 1 else jnp.uint32


def _either(parts: Any) -> Shaped[Any, "..."]:
    return functools.reduce(operator.or_, parts)
