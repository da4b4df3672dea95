"""Quantized arrays: what they hold, and the values they stand for."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxopt_llm.kernels.codes import unpack_codes

Act = tuple[int, int | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized weight with value `scale * data + bias`, one row per output.

    Attributes:
      data: codes. `int8[..., O, I]` or `float8_e4m3fn[..., O, I]` for 8 bits; `uint8[..., O, I * bits / 8]` for 4 and
        3, packed by `pack_codes`, two's complement where there is no bias, counted from 0 where there is.
      scale: `[..., O, I/group]`, in the dtype it was stored in; one group means one scale a row.
      bias: as `scale`, or None for symmetric codes. Where zero is a code it is `round(-bias / scale)`.
      bits: width of a code.
      act: None for float activations, or `(bits, group)`: activations are rounded on the fly, a scale each `group`
        features, or a row where that is None.

    As with any pytree, shapes, shardings or tangents can stand where arrays do.
    The group size is not stored: inside a `shard_map` shapes are local, and it follows from them.
    """

    data: Any
    scale: Any
    bias: Any = None
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    act: Act | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return (*self.data.shape[:-1], self.data.shape[-1] * 8 // self.bits)

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

    __iter__ = None  # Python would index on and on: an array takes any index for its last

    def codes(self) -> Shaped[Any, "... I"]:
        """The unpacked codes, int8 or an 8-bit float. NumPy in, NumPy out."""
        return self.data if self.bits == 8 else unpack_codes(self.data, self.bits, signed=self.bias is None)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Any, "... I"]:
        """The values, computed in float32 and rounded once. NumPy in, NumPy out."""
        codes = self.codes().astype(jnp.float32).reshape(*self.scale.shape, self.group)
        values = codes * self.scale[..., None].astype(jnp.float32)
        if self.bias is not None:
            values = values + self.bias[..., None].astype(jnp.float32)
        return values.reshape(self.shape).astype(dtype)


Weight = Array | QArray
