"""Quantized weights in the order in which the CPU kernels read them. `linear.h` describes it for C++."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxopt_llm.kernels.qarray import Act, QArray, Weight

LANES = 16  # outputs of a panel
_BLOCK = 16  # inputs, at least, that share a scale of the weights
_ROUNDED = 32  # inputs that share a scale of rounded activations
ROUND_BLOCKS, ROUND_ROWS = (8, _ROUNDED), (8, None)
_BYTE_ZERO = 128  # 8-bit codes are stored unsigned, with this added
_NIBBLE_ZERO = 8  # likewise, 4-bit ones that have no minimum
_SCALES = (jnp.float32, jnp.float16, jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """Weights `[O, I]` in panels of 16 outputs and vectors of 64 bytes.

    Of weights `[E, O, I]` every array has a leading dimension of experts.

    Attributes:
      codes: `uint8[panels, vectors, 16, 4]`, four inputs of 16 outputs a vector. Of 4-bit codes the low nibbles
        are one such vector and the high nibbles the next.
      scale: `[panels, scales, 16]`, as stored in the weights.
      minimum: as scale, added to `scale * code`; None for symmetric codes.
      rows: O; the last panel may be partly empty.
      bits: width of a code.
      act: how activations are rounded, as `QArray.act`: in blocks by the kernel, in rows before it.
      paired: whether panels alternate between the weights' first and second half.
    """

    codes: Any
    scale: Any
    minimum: Any
    rows: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    act: Act | None = dataclasses.field(metadata={"static": True})
    paired: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, _, vectors, _, _ = self.codes.shape
        return *experts, self.rows, vectors * 4 * 8 // self.bits

    def dequantize_rows(self, ids: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B I"]:
        """The values of rows `ids`, as `QArray.dequantize` gives them."""
        panel, lane = self._place(ids)
        codes = self.codes[panel, :, lane]
        if self.bits == 4:  # [*B, vector pairs, 4] to one vector after another
            codes = jnp.stack([codes & 0xF, codes >> 4], axis=-2)
        zero = _BYTE_ZERO if self.bits == 8 else _NIBBLE_ZERO if self.minimum is None else 0
        scale, minimum = (None if a is None else a[panel, :, lane] for a in (self.scale, self.minimum))
        codes = (codes.astype(jnp.int16) - zero).astype(jnp.int8).reshape(*ids.shape, self.shape[1])
        return QArray(codes, scale, minimum).dequantize(dtype)

    def _place(self, rows: Int[Array, "*B"]) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
        """Panel and lane of each row."""
        if not self.paired:
            return rows // LANES, rows % LANES
        half = self.rows // 2
        within = rows % half
        return within // LANES * 2 + rows // half, within % LANES


def form(w: Weight) -> Hashable | None:
    """What weights of one input must share to be packed together; None where the kernels do not know it."""
    if not isinstance(w, QArray) or w.ndim not in (2, 3):
        return None
    known = (
        w.bits in (8, 4, 3)
        and jnp.issubdtype(w.data.dtype, jnp.integer)
        and w.group % _BLOCK == 0
        and (w.act in (None, ROUND_ROWS) or (w.act == ROUND_BLOCKS and w.shape[-1] % _ROUNDED == 0))
        and w.scale.dtype in _SCALES
        and (w.bias is None or w.bias.dtype == w.scale.dtype)
    )
    return (_width(w), w.act, w.bias is None, w.group, w.scale.dtype) if known else None


@functools.partial(jax.jit, static_argnames="paired")
def pack(weights: Sequence[QArray], *, paired: bool) -> Panels:
    """Panels of weights of one form; `paired` takes two of equal shape."""
    first = weights[0]
    if first.ndim == 3:
        return jax.vmap(functools.partial(pack, paired=paired))(weights)
    codes = [_vectors(w) for w in weights]
    scale = [w.scale for w in weights]
    return Panels(
        codes=arrange(codes, paired).swapaxes(1, 2),
        scale=arrange(scale, paired).swapaxes(1, 2),
        minimum=None if first.bias is None else arrange([w.bias for w in weights], paired).swapaxes(1, 2),
        rows=sum(w.shape[0] for w in weights),
        bits=_width(first),
        act=first.act,
        paired=paired,
    )


def _width(w: QArray) -> int:
    """Bits that a code takes in panels: one of 3 lies in a nibble, as it is."""
    return 8 if w.bits == 8 else 4


def _vectors(w: QArray) -> Shaped[Array, "O vectors 4"]:
    zero = _BYTE_ZERO if w.bits == 8 else _NIBBLE_ZERO if w.bias is None else 0
    codes = (w.codes().astype(jnp.int16) + zero).astype(jnp.uint8).reshape(w.shape[0], -1, 4)
    return codes if _width(w) == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def arrange(parts: Sequence[Shaped[Array, "_ *rest"]], paired: bool) -> Shaped[Array, "panels 16 *rest"]:
    """Rows in panels, zeros where there are none; paired, the panels of two parts alternate."""
    if not paired:
        return _panels(jnp.concatenate(parts))
    panels = jnp.stack([_panels(part) for part in parts], axis=1)
    return panels.reshape(-1, *panels.shape[2:])


def _panels(rows: Shaped[Array, "O *rest"]) -> Shaped[Array, "panels 16 *rest"]:
    padding = -rows.shape[0] % LANES
    padded = jnp.pad(rows, ((0, padding),) + ((0, 0),) * (rows.ndim - 1))
    return padded.reshape(-1, LANES, *rows.shape[1:])
