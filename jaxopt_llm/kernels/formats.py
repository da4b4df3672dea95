"""Rounding formats: their names, their grids of values, and rounding to nearest."""

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxopt_llm.kernels.codes import AnyArray, array_module, pack_codes
from jaxopt_llm.kernels.qarray import Act, QArray

_FLOAT8 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A rounding: codes with a scale for each group of input features.

    Attributes:
      bits: width of a code.
      group: input features that share a scale; None for one scale an output channel.
      scale_dtype: of the scales, and of the biases.
      offset: None for codes that are symmetric about 0. "minimum": they begin at the group's smallest value, which is
        kept as a float. "zero": at a whole number of steps below 0, so that 0 itself is a code.
      act: activations rounded on the fly, as `QArray.act`.
      floating: codes are float8_e4m3fn, whose steps grow with the value, not integers.
    """

    bits: int
    group: int | None
    scale_dtype: Any
    offset: Literal["zero", "minimum"] | None = None
    act: Act | None = None
    floating: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if self.floating:
            return -448, 448
        half = 2 ** (self.bits - 1)
        if self.offset is None:
            return 1 - half, half - 1
        return (-half, half - 1) if self.bits == 8 else (0, 2 * half - 1)

    def check(self, features: int, what: str) -> None:
        """Raises ValueError if a weight named `what` with so many input features has no such form."""
        if self.group and features % self.group:
            raise ValueError(
                f"{what} has {features} input features, which groups of {self.group} do not divide; use int8"
            )

    def shapes(self, shape: tuple[int, ...]) -> QArray:
        """What a weight of this shape becomes, shapes and dtypes in the place of arrays."""
        *rows, features = shape
        groups = (*rows, features // (self.group or features))
        scale = jax.ShapeDtypeStruct(groups, jnp.dtype(self.scale_dtype))
        dtype = _FLOAT8 if self.floating else jnp.int8 if self.bits == 8 else jnp.uint8
        data = jax.ShapeDtypeStruct((*rows, features * self.bits // 8), dtype)
        return QArray(data, scale, scale if self.offset else None, bits=self.bits, act=self.act)

    def span(self, groups: Float[AnyArray, "*G I"]) -> tuple[Float[AnyArray, "*G"], Float[AnyArray, "*G"]]:
        """From where to where the codes of each group have to reach, for all of its values to be among them."""
        if self.offset is not None:
            return groups.min(-1), groups.max(-1)
        high = abs(groups).max(-1)
        return -high, high

    def grid(
        self, low: Float[AnyArray, "*G"], high: Float[AnyArray, "*G"]
    ) -> tuple[Float[AnyArray, "*G"], Float[AnyArray, "*G"] | None]:
        """Scale and bias (None where codes are symmetric), as stored, of groups whose values reach from low to high."""
        xp, dtype, (least, most) = array_module(low), jnp.dtype(self.scale_dtype), self.limits
        if self.offset is None:
            return (xp.maximum(-low, high) / np.float32(most)).astype(dtype), None
        if self.offset == "zero":
            low, high = xp.minimum(low, 0), xp.maximum(high, 0)
        scale = (high - low) / np.float32(most - least)
        if self.offset == "minimum":
            scale = scale.astype(dtype)
            return scale, (low - least * scale.astype(jnp.float32)).astype(dtype)
        scale = _significant(scale, int(jnp.finfo(dtype).nmant) + 1 - self.bits).astype(dtype)
        step = scale.astype(jnp.float32)
        zero = xp.clip(least - xp.round(low / _not_zero(step)), least, most)
        return scale, (-zero * step).astype(dtype)

    def encode(
        self,
        values: Float[AnyArray, "..."],
        scale: Float[AnyArray, "..."],
        bias: Float[AnyArray, "..."] | None,
    ) -> Shaped[AnyArray, "..."]:
        """The nearest codes, not packed, of float32 values on a grid whose arrays broadcast against them."""
        xp, (least, most) = array_module(values), self.limits
        if bias is not None:
            values = values - bias.astype(jnp.float32)
        steps = values / _not_zero(scale.astype(jnp.float32))
        if self.floating:
            return xp.clip(steps, least, most).astype(_FLOAT8)
        return xp.clip(xp.round(steps), least, most).astype(jnp.int8)

    def assemble(
        self,
        codes: Shaped[AnyArray, "... I"],
        scale: Float[AnyArray, "... G"],
        bias: Float[AnyArray, "... G"] | None,
    ) -> QArray:
        """A weight of what `encode` and `grid` gave."""
        data = codes if self.bits == 8 else pack_codes(codes, self.bits)
        return QArray(data, scale, bias, bits=self.bits, act=self.act)

    def quantize(self, w: Shaped[AnyArray, "... I"]) -> QArray:
        """Float weights rounded to nearest. NumPy in, NumPy out: a loader rounds while it reads.

        Codes are rounded against scale and bias as they are stored: float16 costs no more than its own rounding.

        Raises:
          ValueError: if the group does not divide the last dimension.
        """
        return self.assemble(*self._round(w))

    def _round(self, w: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray | None]:
        group = self.group or w.shape[-1]
        if w.shape[-1] % group:
            raise ValueError(f"{group=} must divide the {w.shape[-1]} input features")
        groups = w.astype(jnp.float32).reshape(*w.shape[:-1], w.shape[-1] // group, group)
        scale, bias = self.grid(*self.span(groups))
        codes = self.encode(groups, scale[..., None], None if bias is None else bias[..., None])
        return codes.reshape(w.shape), scale, bias


def _significant(x: AnyArray, bits: int) -> AnyArray:
    """`x` rounded to so many significant bits: times a whole number of as many bits as are left it is exact."""
    xp = array_module(x)
    mantissa, exponent = xp.frexp(x)
    return xp.ldexp(xp.round(xp.ldexp(mantissa, bits)), exponent - bits)


def _not_zero(scale: AnyArray) -> AnyArray:
    return array_module(scale).where(scale == 0, np.float32(1), scale)


FORMATS = {
    "int8": Format(bits=8, group=None, scale_dtype="float32"),
    "int8_block": Format(bits=8, group=32, scale_dtype="float16", act=(8, 32)),  # GGUF's Q8_0
    "int4": Format(bits=4, group=32, scale_dtype="float16", offset="minimum", act=(8, 32)),  # GGUF's Q4_1
    "w8a8": Format(bits=8, group=None, scale_dtype="float32", act=(8, None)),
    "fp8": Format(bits=8, group=None, scale_dtype="float32", floating=True),
}
"""Formats with a name of their own; `quantization_format` knows those in groups too."""

_GROUPED = re.compile(r"int([843])_g(32|64|128)(?:_(sym|zero|min))?")
_OFFSETS: dict[str | None, Literal["zero", "minimum"] | None] = {"zero": "zero", "min": "minimum"}


def quantization_format(name: str) -> Format:
    """The format of that name.

    Args:
      name: one of `FORMATS`, or `int{8,4,3}_g{32,64,128}` with `_sym` (the same as without), `_zero` or `_min`: weights
        alone, symmetric, from an integer zero, or from a float minimum.

    Raises:
      ValueError: if it is unknown; the message lists the known.
    """
    if name in FORMATS:
        return FORMATS[name]
    found = _GROUPED.fullmatch(name)
    if found is None:
        raise ValueError(
            f"unknown quantization {name!r}; known are {', '.join(FORMATS)}, "
            "and int{8,4,3}_g{32,64,128} alone or with _sym, _zero or _min"
        )
    bits, group, offset = int(found[1]), int(found[2]), _OFFSETS.get(found[3])
    # Half the bytes of float32, and finer than bfloat16. But an 8-bit zero leaves its scale no digits in float16.
    scale_dtype = "float32" if (bits, offset) == (8, "zero") else "float16"
    return Format(bits=bits, group=group, scale_dtype=scale_dtype, offset=offset)


def round_symmetric(
    x: Shaped[AnyArray, "... I"], *, bits: int, group: int, scale_dtype: Any = jnp.float32
) -> tuple[Int[AnyArray, "... I"], Float[AnyArray, "... G"]]:
    """Rounds to nearest in groups of the last dimension: codes in int8, and `scale = max|x| / (2**(bits-1) - 1)`.

    Codes are rounded against the scale as it is stored. NumPy in, NumPy out.

    Raises:
      ValueError: if `group` does not divide the last dimension.
    """
    codes, scale, _ = Format(bits=bits, group=group, scale_dtype=scale_dtype)._round(x)
    return codes, scale
