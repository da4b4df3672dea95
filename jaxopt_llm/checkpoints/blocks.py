"""GGML's block types: values in blocks of 32 to 256 that share scales, and their native, lossless form.

Layouts: ggml-quants.h and the reference dequantizers of the `gguf` package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
import numpy as np

_DEQUANTIZABLE = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)

SIZES: dict[str, tuple[int, int]] = {
    name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    for name in _DEQUANTIZABLE
    if name in gguf.GGMLQuantizationType.__members__  # the newest types are not in older packages
}
"""(elements, bytes) of a block of each type that can be read."""


class NativeBlocks(NamedTuple):
    """Codes and scales of a weight `[..., O, I]`, with value `scale * data + bias`.

    Attributes:
      data: int8 `[..., O, I]`, or 4-bit codes as uint8 `[..., O, I / 2]`, element 2j in the low half of byte
        j and 2j + 1 in the high half; two's complement without a bias, 0 to 15 with one.
      scale: `[..., O, I / group]`, in the file's float16, or float32 where the file multiplies two scales.
      bias: like `scale`, or none.
    """

    data: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class NativeForm:
    """The native form of a block type: bits of a code, elements that share a scale, dtype of the scales."""

    bits: int
    group: int
    scale: type[np.floating]
    bias: bool
    split: Callable[[np.ndarray], NativeBlocks]  # of uint8 [blocks, bytes of one]

    def allocate(
        self, empty: Callable[[Sequence[int], Any], np.ndarray], rows: Sequence[int], width: int
    ) -> NativeBlocks:
        """Arrays made by `empty(shape, dtype)` for a weight `[*rows, width]`."""
        scales = (*rows, width // self.group)
        return NativeBlocks(
            empty((*rows, width * self.bits // 8), np.int8 if self.bits == 8 else np.uint8),
            empty(scales, self.scale),
            empty(scales, self.scale) if self.bias else None,
        )


def dequantize(raw: np.ndarray, storage: str) -> np.ndarray:
    """float32 values `[..., I]` of rows of blocks, uint8 `[..., bytes of a row]`.

    Makes a few temporaries of the result's size: meant for a piece at a time.
    """
    elements, nbytes = SIZES[storage]
    shape = (*raw.shape[:-1], raw.shape[-1] // nbytes * elements)
    if not raw.size:
        return np.empty(shape, np.float32)
    with np.errstate(all="ignore"):  # a scale may be infinite or NaN
        values = gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[storage])
    return values.reshape(shape)


def native_form(storage: str) -> NativeForm:
    """Raises ValueError if the type has none."""
    if storage not in _NATIVE:
        raise ValueError(f"{storage} has no native form; those that have: {', '.join(_NATIVE)}")
    return _NATIVE[storage]


def native(raw: np.ndarray, storage: str) -> NativeBlocks:
    """Codes and scales of rows of blocks, uint8 `[..., bytes of a row]`; a piece at a time, as `dequantize`.

    Q8_0 and those of 4 and 5 bits lose nothing; codes of 5 or 6 bits take a byte. The K types hold a float16 scale for
    256 elements and a small integer for 32 or 16 of them: here they are multiplied out, in float32, as their
    dequantizer does.
    """
    form, (elements, nbytes) = native_form(storage), SIZES[storage]
    rows = raw.shape[:-1]
    if not raw.size:
        return form.allocate(np.empty, rows, raw.shape[-1] // nbytes * elements)
    data, scale, bias = form.split(raw.reshape(-1, nbytes))
    return NativeBlocks(
        data.reshape(*rows, -1), scale.reshape(*rows, -1), None if bias is None else bias.reshape(*rows, -1)
    )


def quantize_q8_0(values: np.ndarray) -> np.ndarray:
    """Q8_0 blocks, uint8 `[..., I / 32 * 34]`, of values `[..., I]`; a piece at a time, as `dequantize`.

    Raises:
      ValueError: if the last axis is no multiple of 32, or a value is not finite or beyond 127 * 65504.
    """
    if values.shape[-1] % 32:
        raise ValueError(f"Q8_0 holds rows of a multiple of 32, not {values.shape[-1]}; write it as F16")
    values = values.astype(np.float32, copy=False)
    if not (np.abs(values) <= 127 * 65504.0).all():
        raise ValueError("values that are not finite, or too large for a float16 scale, have no Q8_0 form")
    raw = gguf.quants.quantize(values.reshape(1, -1), gguf.GGMLQuantizationType.Q8_0)
    return raw.reshape(*values.shape[:-1], values.shape[-1] // 32 * 34)


def pack_q8_0(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Q8_0 blocks, uint8 `[..., I / 32 * 34]`, of int8 `[..., I]` and float16 scales `[..., I / 32]`."""
    raw = np.empty((*scale.shape, 34), np.uint8)
    raw[..., :2] = scale[..., None].view(np.uint8)
    raw[..., 2:] = data.reshape(*scale.shape, 32).view(np.uint8)
    return raw.reshape(*scale.shape[:-1], -1)


def _nibbles(raw: np.ndarray, run: int) -> np.ndarray:
    """Packs neighbours: GGML has element i of a run in the low halves, i + run in the high halves."""
    halves = raw.reshape(-1, 1, run) >> np.array([[0], [4]], np.uint8) & 15
    pairs = halves.reshape(-1, run, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def _split_q8_0(raw: np.ndarray) -> NativeBlocks:
    return NativeBlocks(raw[:, 2:].view(np.int8), raw[:, :2].view(np.float16), None)


def _split_q4_0(raw: np.ndarray) -> NativeBlocks:
    return NativeBlocks(
        _nibbles(raw[:, 2:], 16) ^ 0x88, raw[:, :2].view(np.float16), None
    )  # q ^ 8 is q - 8 in 4 bits


def _split_q4_1(raw: np.ndarray) -> NativeBlocks:
    return NativeBlocks(_nibbles(raw[:, 4:], 16), raw[:, :2].view(np.float16), raw[:, 2:4].view(np.float16))


def _five_bits(raw: np.ndarray) -> np.ndarray:
    """Codes of 32 elements: their highest bits, then the four below, of the first half in the low nibbles."""
    low = raw[:, 4:].reshape(-1, 1, 16) >> np.array([[0], [4]], np.uint8) & 15
    high = np.unpackbits(raw[:, :4], axis=1, bitorder="little")
    return (low.reshape(-1, 32) | high << 4).view(np.int8)


def _split_q5_0(raw: np.ndarray) -> NativeBlocks:
    return NativeBlocks(_five_bits(raw[:, 2:]) - np.int8(16), raw[:, :2].view(np.float16), None)


def _split_q5_1(raw: np.ndarray) -> NativeBlocks:
    return NativeBlocks(_five_bits(raw[:, 4:]), raw[:, :2].view(np.float16), raw[:, 2:4].view(np.float16))


def _affine_k(raw: np.ndarray, codes: np.ndarray) -> NativeBlocks:
    """Q4_K and Q5_K, which begin alike."""
    d, d_min = raw[:, :4].view(np.float16).astype(np.float32).T[..., None]
    scale, minimum = gguf.quants.Q4_K.get_scale_min(np.ascontiguousarray(raw[:, 4:16]))
    with np.errstate(all="ignore"):
        return NativeBlocks(codes, d * scale, -(d_min * minimum))


def _split_q4_k(raw: np.ndarray) -> NativeBlocks:
    return _affine_k(raw, _nibbles(raw[:, 16:], 32))


def _split_q5_k(raw: np.ndarray) -> NativeBlocks:
    low = raw[:, 48:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8) & 15
    high = raw[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _affine_k(raw, (low.reshape(-1, 256) | high.reshape(-1, 256) << 4).view(np.int8))


def _split_q6_k(raw: np.ndarray) -> NativeBlocks:
    low = raw[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    codes = low.reshape(-1, 256) | high.reshape(-1, 256) << 4
    d = raw[:, 208:].view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        return NativeBlocks(codes.view(np.int8) - np.int8(32), d * raw[:, 192:208].view(np.int8), None)


_NATIVE = {
    "Q8_0": NativeForm(8, 32, np.float16, False, _split_q8_0),
    "Q4_0": NativeForm(4, 32, np.float16, False, _split_q4_0),
    "Q4_1": NativeForm(4, 32, np.float16, True, _split_q4_1),
    "Q5_0": NativeForm(8, 32, np.float16, False, _split_q5_0),
    "Q5_1": NativeForm(8, 32, np.float16, True, _split_q5_1),
    "Q4_K": NativeForm(4, 32, np.float32, True, _split_q4_k),
    "Q5_K": NativeForm(8, 32, np.float32, True, _split_q5_k),
    "Q6_K": NativeForm(8, 16, np.float32, False, _split_q6_k),
}
