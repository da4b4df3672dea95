"""Block types against the `gguf` package's dequantizers and quantizer."""

import gguf
import numpy as np
import pytest

from jaxopt_llm.checkpoints import blocks

NATIVE = {  # the high bytes of its float16 scales
    "Q8_0": [1],
    "Q4_0": [1],
    "Q4_1": [1, 3],
    "Q5_0": [1],
    "Q5_1": [1, 3],
    "Q4_K": [1, 3],
    "Q5_K": [1, 3],
    "Q6_K": [209],
}


def random_blocks(storage: str, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Any bytes are blocks; the scales of types with a native form are kept finite."""
    raw = np.random.default_rng(seed).integers(0, 256, (rows, count * blocks.SIZES[storage][1]), np.uint8)
    if storage in NATIVE:
        by_block = raw.reshape(-1, blocks.SIZES[storage][1])
        for high_byte in NATIVE[storage]:
            by_block[:, high_byte] &= 0xBF
    return raw


def expected(raw: np.ndarray, storage: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[storage])


def test_every_type_that_gguf_can_dequantize():
    def supported(kind: gguf.GGMLQuantizationType) -> bool:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    plain = {"F32", "F16", "BF16"}
    assert {kind.name for kind in gguf.GGMLQuantizationType if supported(kind)} - plain == set(blocks.SIZES)


@pytest.mark.parametrize("storage", blocks.SIZES)
def test_dequantize(storage):
    raw = random_blocks(storage, 6, 3)
    np.testing.assert_array_equal(blocks.dequantize(raw, storage), expected(raw, storage))
    stacked = raw.reshape(2, 3, -1)
    np.testing.assert_array_equal(
        blocks.dequantize(stacked, storage), expected(raw, storage).reshape(2, 3, -1)
    )
    assert blocks.dequantize(raw[:0], storage).shape == (0, 3 * blocks.SIZES[storage][0])


@pytest.mark.parametrize("storage", NATIVE)
def test_native_has_the_values_of_the_blocks(storage):
    raw = random_blocks(storage, 4, 2)
    native = blocks.native(raw, storage)
    np.testing.assert_array_equal(value(native), expected(raw, storage))
    form = blocks.native_form(storage)
    due = form.allocate(np.empty, (4,), 2 * blocks.SIZES[storage][0])
    for got, want in zip(native, due, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert blocks.native(raw.reshape(2, 2, -1), storage).data.shape == (2, 2, native.data.shape[-1])
    assert blocks.native(raw[:0], storage).scale.shape == (0, native.scale.shape[-1])


def value(native: blocks.NativeBlocks) -> np.ndarray:
    """`scale * data + bias`, as the docstring defines it."""
    data = native.data
    if data.dtype == np.uint8:
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1).astype(np.int8)
        data = codes if native.bias is not None else np.where(codes > 7, codes - 16, codes)
    spread = lambda a: np.repeat(a.astype(np.float32), data.shape[-1] // a.shape[-1], axis=-1)
    scaled = spread(native.scale) * data.astype(np.float32)
    return scaled if native.bias is None else scaled + spread(native.bias)


def test_only_some_types_have_a_native_form():
    with pytest.raises(ValueError, match=r"Q2_K has no native form; those that have: Q8_0"):
        blocks.native_form("Q2_K")


def test_q8_0_round_trip():
    values = np.random.default_rng(0).standard_normal((3, 5, 96), np.float32)
    raw = blocks.quantize_q8_0(values)
    assert (raw.shape, raw.dtype) == ((3, 5, 3 * 34), np.uint8)
    np.testing.assert_array_equal(
        raw.reshape(15, -1), gguf.quants.quantize(values.reshape(15, 96), gguf.GGMLQuantizationType.Q8_0)
    )
    error = np.abs(blocks.dequantize(raw, "Q8_0") - values).reshape(3, 5, 3, 32)
    largest = np.abs(values).reshape(3, 5, 3, 32).max(-1, keepdims=True)
    assert (error <= largest * (0.5 / 127 + 2**-10)).all()  # half a step, and the scale's own rounding
    native = blocks.native(raw, "Q8_0")
    np.testing.assert_array_equal(blocks.pack_q8_0(native.data, native.scale), raw)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
def test_q8_0_refuses_what_it_cannot_hold(bad):
    with pytest.raises(ValueError, match="no Q8_0 form"):
        blocks.quantize_q8_0(np.full((1, 32), bad, np.float32))


def test_q8_0_refuses_odd_rows():
    with pytest.raises(ValueError, match="multiple of 32, not 33; write it as F16"):
        blocks.quantize_q8_0(np.zeros((2, 33), np.float32))
