"""Quantized arrays: what they hold, rounding to nearest, and back."""

import dataclasses
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

_PACK = {8: 1, 4: 2}  # codes in a byte
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized weight with value `scale * data + bias`, one row per output.

    Attributes:
      data: codes. `int8[..., O, I]` for 8 bits; `uint8[..., O, I/2]` for 4 bits, element 2j in the low
        nibble and 2j+1 in the high one, two's complement where there is no bias, 0..15 where there is.
      scale: `[..., O, I/group]`, in the dtype it was stored in; one group means one scale a row.
      bias: as `scale`, or None for symmetric codes.
      bits: width of a code.
      act: None for float activations, or `(bits, group)`: activations are rounded on the fly.

    As with any pytree, shapes, shardings or tangents can stand where arrays do.
    The group size is not stored: inside a `shard_map` shapes are local, and it follows from them.
    """

    data: Any
    scale: Any
    bias: Any = None
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    act: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return (*self.data.shape[:-1], self.data.shape[-1] * _PACK[self.bits])

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def group(self) -> int:
        """Input features that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales and biases."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: int | slice | Int[Array, "*n"]) -> Self:
        """Rows (or experts) of the leading dimension."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def codes(self) -> Int[Any, "... I"]:
        """The unpacked codes, int8. NumPy in, NumPy out."""
        if self.bits == 8:
            return self.data
        xp = _module(self.data)
        nibbles = xp.stack([self.data & 0xF, self.data >> 4], axis=-1).reshape(self.shape).astype(jnp.int8)
        return nibbles if self.bias is not None else xp.where(nibbles > 7, nibbles - 16, nibbles)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Any, "... I"]:
        """The values, computed in float32 and rounded once. NumPy in, NumPy out."""
        codes = self.codes().astype(jnp.float32).reshape(*self.scale.shape, self.group)
        values = codes * self.scale[..., None].astype(jnp.float32)
        if self.bias is not None:
            values = values + self.bias[..., None].astype(jnp.float32)
        return values.reshape(self.shape).astype(dtype)


def _module(array: Any) -> Any:
    """`jax.numpy` for JAX arrays, NumPy for its own."""
    return jnp if isinstance(array, jax.Array) else np


Weight = Array | QArray


class Rounded(NamedTuple):
    """The leaves of a `QArray`, on the host or on a device."""

    data: Any
    scale: Any
    bias: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A rounding to nearest: codes with a scale for each group of input features.

    Attributes:
      bits: width of a code.
      group: input features that share a scale; None for one scale an output channel.
      scale_dtype: numpy name of the scales' dtype.
      minimum: codes count up from the group's smallest value, which is kept too; else they are symmetric.
      act: activations rounded on the fly, as `QArray.act`.
    """

    bits: int
    group: int | None
    scale_dtype: str
    minimum: bool = False
    act: tuple[int, int] | None = None

    def check(self, features: int, what: str) -> None:
        """Raises ValueError if a weight named `what` with so many input features has no such form."""
        if self.group and features % self.group:
            raise ValueError(
                f"{what} has {features} input features, which groups of {self.group} do not divide; use int8"
            )

    def shapes(self, shape: tuple[int, ...]) -> QArray:
        """What a weight of this shape becomes, shapes and dtypes in the place of arrays."""
        *rows, features = shape
        scale = jax.ShapeDtypeStruct(
            (*rows, features // (self.group or features)), jnp.dtype(self.scale_dtype)
        )
        data = jax.ShapeDtypeStruct(
            (*rows, features // _PACK[self.bits]), jnp.uint8 if self.bits < 8 else jnp.int8
        )
        return QArray(data, scale, scale if self.minimum else None, bits=self.bits, act=self.act)

    def round(self, w: Shaped[AnyArray, "... I"]) -> Rounded:
        """Codes, packed, and scales of float weights. NumPy in, NumPy out: a loader rounds while it reads."""
        group, dtype = self.group or w.shape[-1], jnp.dtype(self.scale_dtype)
        bias = None
        if self.minimum:
            codes, scale, bias = round_affine(w, bits=self.bits, group=group, scale_dtype=dtype)
        else:
            codes, scale = round_symmetric(w, bits=self.bits, group=group, scale_dtype=dtype)
        return Rounded(codes if self.bits == 8 else pack_nibbles(codes), scale, bias)

    def quantize(self, w: Float[Array, "... I"]) -> QArray:
        """Float weights as a `QArray`."""
        return QArray(*self.round(w), bits=self.bits, act=self.act)


FORMATS = {
    "int8": Format(bits=8, group=None, scale_dtype="float32"),
    "int8_block": Format(bits=8, group=32, scale_dtype="float16", act=(8, 32)),  # GGUF's Q8_0
    "int4": Format(bits=4, group=32, scale_dtype="float16", minimum=True, act=(8, 32)),  # GGUF's Q4_1
}


def quantization_format(name: str) -> Format:
    """The format of that name.

    Raises:
      ValueError: if it is unknown; the message lists the known.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown quantization {name!r}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def round_symmetric(
    x: Shaped[AnyArray, "... I"], *, bits: int, group: int, scale_dtype: Any = jnp.float32
) -> tuple[Shaped[AnyArray, "... I"], Shaped[AnyArray, "... G"]]:
    """Rounds to nearest in groups of the last dimension: codes in int8, and `scale = max|x| / (2**(bits-1) - 1)`.

    Codes are rounded against the scale as it is stored, so that a float16 scale costs no more than its own
    rounding. NumPy in, NumPy out: a loader rounds on the host while it reads.

    Raises:
      ValueError: if `group` does not divide the last dimension.
    """
    if x.shape[-1] % group:
        raise ValueError(f"{group=} must divide the {x.shape[-1]} input features")
    xp = _module(x)
    limit = 2 ** (bits - 1) - 1
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    scale = (xp.abs(groups).max(-1) / np.float32(limit)).astype(scale_dtype)
    stored = scale.astype(jnp.float32)[..., None]
    codes = xp.clip(xp.round(groups / xp.where(stored == 0, np.float32(1), stored)), -limit, limit)
    return codes.astype(jnp.int8).reshape(x.shape), scale


def round_affine(
    x: Shaped[AnyArray, "... I"], *, bits: int, group: int, scale_dtype: Any = jnp.float32
) -> tuple[Shaped[AnyArray, "... I"], Shaped[AnyArray, "... G"], Shaped[AnyArray, "... G"]]:
    """Rounds to nearest in groups of the last dimension, from the smallest value up.

    Codes in uint8, `scale = (max - min) / (2**bits - 1)` and `bias = min`; codes are rounded against both as they
    are stored. NumPy in, NumPy out.

    Raises:
      ValueError: if `group` does not divide the last dimension.
    """
    if x.shape[-1] % group:
        raise ValueError(f"{group=} must divide the {x.shape[-1]} input features")
    xp = _module(x)
    limit = 2**bits - 1
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // group, group)
    least, most = groups.min(-1), groups.max(-1)
    scale, bias = ((most - least) / np.float32(limit)).astype(scale_dtype), least.astype(scale_dtype)
    stored, low = scale.astype(jnp.float32)[..., None], bias.astype(jnp.float32)[..., None]
    codes = xp.clip(xp.round((groups - low) / xp.where(stored == 0, np.float32(1), stored)), 0, limit)
    return codes.astype(jnp.uint8).reshape(x.shape), scale, bias


def pack_nibbles(codes: Shaped[AnyArray, "... I"]) -> Shaped[AnyArray, "... bytes"]:
    """4-bit codes two a byte, the even one in the low nibble."""
    codes = codes.astype(jnp.uint8) & 0xF
    return codes[..., ::2] | codes[..., 1::2] << 4
