"""Our GGUF reader and writer against the `gguf` package, and every way in which a file can be wrong."""

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxopt_llm.checkpoints import blocks
from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.gguf import open_file, write

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 8192,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "é", "", "▁the"],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0],
    "tokenizer.ggml.token_type": [1, -1, 3],
    "flags": [True, False],
    "negative": -5,
    "large": 2**40,
    "larger": 2**64 - 1,
    "large list": [0, -(2**63)],
    "nested": [[1, 2], [3]],
    "empty": [],
}


def by_reference(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and values as the `gguf` package reads them; nested arrays it flattens."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {tensor.name: value(tensor) for tensor in reader.tensors}


def value(tensor: gguf.ReaderTensor) -> np.ndarray:
    whole = tensor.data.dtype != np.uint8
    return np.array(tensor.data) if whole else gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_reads_a_real_file(data_dir):
    metadata, tensors = by_reference(data_dir / "stories260K.gguf")
    with open_file(data_dir / "stories260K.gguf") as source:
        assert source.metadata == metadata
        assert list(source) == list(tensors)
        for name, expected in tensors.items():
            assert source[name].shape == expected.shape
            np.testing.assert_array_equal(source[name].read(), expected)


def test_reads_what_the_package_writes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -5)
    writer.add_int32("i32", -7)
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", False)
    writer.add_array("strings", ["x", "y" * 1000])
    writer.add_custom_alignment(64)
    expected = {}
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"):
        data = gguf.quants.quantize(values(3, 2, 256), gguf.GGMLQuantizationType[kind])
        expected[kind] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for data in (np.arange(6, dtype=t).reshape(2, 3) for t in ("i1", "i2", "i4", "i8", "f8")):
        expected[data.dtype.name] = data
        writer.add_tensor(data.dtype.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_file(tmp_path / "f.gguf")
    assert source.metadata == by_reference(tmp_path / "f.gguf")[0]
    assert source.metadata["u64"] == 2**64 - 1
    assert list(source) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(source[name].read(dtype=array.dtype), array, strict=True)
    assert source["TQ1_0"].storage == "TQ1_0"


def test_the_package_reads_what_we_write(tmp_path):
    floats, fine = values(3, 64), values(3, 64).astype(np.float64)
    raw = np.random.default_rng(0).integers(0, 60, (2, 5, 144), np.uint8)
    tensors = [
        ("f32", (3, 64), "F32", floats),
        ("f16", (3, 64), "F16", lambda: fine),
        ("bf16", (3, 64), "BF16", floats.astype(np.float16)),
        ("q8", (3, 64), "Q8_0", floats.astype(ml_dtypes.bfloat16)),
        ("raw", (2, 5, 256), "Q4_K", raw),
        ("odd", (7,), "F32", values(7)),
        ("none", (0, 32), "F32", values(0, 32)),
        ("last", (33,), "F16", values(33)),
    ]
    write(tmp_path / "f.gguf", METADATA, tensors)
    metadata, got = by_reference(tmp_path / "f.gguf")
    assert metadata == METADATA | {"nested": [1, 2, 3]}
    np.testing.assert_array_equal(got["f32"], floats)
    np.testing.assert_array_equal(got["f16"], floats.astype(np.float16))
    np.testing.assert_array_equal(
        got["bf16"], floats.astype(np.float16).astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    rounded = floats.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(
        blocks.quantize_q8_0(rounded), gguf.GGUFReader(tmp_path / "f.gguf").tensors[3].data
    )
    np.testing.assert_array_equal(got["raw"], blocks.dequantize(raw, "Q4_K"))
    source = open_file(tmp_path / "f.gguf")
    assert source.metadata == METADATA
    assert {name: tensor.storage for name, tensor in source.items()} == {
        name: kind for name, _, kind, _ in tensors
    }
    for name, array in got.items():
        np.testing.assert_array_equal(source[name].read(dtype=np.float32), array)


def test_types_of_what_we_write(tmp_path):
    """llama.cpp refuses a key of another type."""
    numpy = {"u8": np.uint8(1), "f64": np.float64(1), "array": np.array([1, 2], np.uint16)}
    write(tmp_path / "f.gguf", METADATA | numpy, [])
    kinds = {
        key: [t.name for t in field.types]
        for key, field in gguf.GGUFReader(tmp_path / "f.gguf").fields.items()
    }
    expected = {
        "llama.context_length": ["UINT32"], "llama.rope.freq_base": ["FLOAT32"], "negative": ["INT64"],
        "large": ["INT64"], "larger": ["UINT64"], "large list": ["ARRAY", "INT64"],
        "tokenizer.ggml.add_bos_token": ["BOOL"], "flags": ["ARRAY", "BOOL"],
        "tokenizer.ggml.scores": ["ARRAY", "FLOAT32"], "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
        "u8": ["UINT8"], "f64": ["FLOAT64"], "array": ["ARRAY", "UINT16"],
    }  # fmt: skip
    assert {key: kinds[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": None}, [], "a: None has no GGUF type"),
        ({"a": [1, "x"]}, [], "a: a list of mixed types"),
        ({"a": [True, 2]}, [], "a: a list of mixed types"),
        ({"a": [2**70]}, [], r"a: an array of object\(1,\) has no GGUF type"),
        ({"a": np.zeros((2, 2))}, [], r"a: an array of float64\(2, 2\) has no GGUF type"),
        ({"a": {"b": 1}}, [], "has no GGUF type"),
        ({}, [("t", (1,), "F32", np.ones(1))] * 2, "'t' is written twice"),
        ({}, [("t", (1,), "Q9", np.ones(1))], "unknown type Q9; known: F32"),
        ({}, [("t", (33,), "Q8_0", np.ones(33))], "'t': Q8_0 holds rows of a multiple of 32, not 33"),
        (
            {},
            [("t", (32,), "Q4_0", np.ones(32))],
            "'t': values can be written as F32, F16, BF16 or Q8_0, not Q4_0",
        ),
        (
            {},
            [("t", (32,), "Q8_0", np.full(32, np.nan))],
            "'t' cannot be written as Q8_0: values that are not",
        ),
        ({}, [("t", (1,), "F16", np.full(1, 1e6, np.float32))], "'t' cannot be written as F16: overflow"),
        (
            {},
            [("t", (1,), "F16", np.full(1, 1e6, ml_dtypes.bfloat16))],
            "'t' cannot be written as F16: overflow",
        ),
        ({}, [("t", (2,), "F32", np.ones(1))], r"'t' has shape \(1,\), announced as \(2,\)"),
        ({}, [("t", (), "F32", np.ones(()))], "1 to 4 dimensions, not 0"),
    ],
)
def test_write_refuses(tmp_path, metadata, tensors, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "f.gguf", metadata, tensors)
    assert not list(tmp_path.iterdir())


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def header(tensors: int = 0, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def tensor(name: str = "t", shape: tuple[int, ...] = (1,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def one(key: str, code: int, value: bytes) -> bytes:
    return header(pairs=1) + text(key) + struct.pack("<I", code) + value


ARRAY = lambda code, count: struct.pack("<IQ", code, count)


def test_a_large_vocabulary_parses_fast(tmp_path):
    tokens = [f"token {i} é" for i in range(262_144)]
    (tmp_path / "f").write_bytes(one("tokens", 9, ARRAY(8, len(tokens)) + b"".join(map(text, tokens))))
    start = time.perf_counter()
    metadata = open_file(tmp_path / "f").metadata
    assert time.perf_counter() - start < 2  # 0.15 s on an idle core
    assert metadata["tokens"] == tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(magic=b"GGML"), "does not start with 'GGUF'"),
        (b"GG", "does not start with 'GGUF'"),
        (b"GGUF", "truncated or corrupted: 4 bytes are due at 4 of 4"),
        (header()[:20], "truncated or corrupted"),
        (header(version=1), "GGUF version 1; 2 and 3 can be read"),
        (header(version=4), "GGUF version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
        (header(tensors=2**63), "9223372036854775808 entries announced at byte 8"),
        (header(pairs=10**6), "1000000 entries announced at byte 16"),
        (header(pairs=1) + struct.pack("<Q", 2**64 - 1) + bytes(9), "truncated or corrupted: 184467"),
        (header(pairs=1) + text(b"\xff") + bytes(9), "the string at byte 32 is not UTF-8"),
        (one("k", 13, bytes(8)), "unknown value type 13"),
        (one("k", 7, b"\2"), "a truth value before byte"),
        (one("k", 9, ARRAY(7, 2) + b"\1\2"), "a truth value before byte"),
        (one("k", 10, bytes(7)), "truncated or corrupted"),
        (one("k", 8, text(b"\xff")), "is not UTF-8"),
        (one("k", 9, ARRAY(0, 2**62)), "truncated or corrupted"),
        (one("k", 9, ARRAY(12, 2**61)), "truncated or corrupted"),
        (one("k", 9, ARRAY(8, 2**61)), "entries announced"),
        (one("k", 9, ARRAY(8, 1) + struct.pack("<Q", 9)), "truncated or corrupted: a string at byte"),
        (one("k", 9, ARRAY(8, 1) + text(b"\xff")), "is truncated or not UTF-8"),
        (one("k", 9, ARRAY(8, 2) + text("abcdefgh")), "is truncated or not UTF-8"),
        (one("k", 9, ARRAY(99, 1)), "unknown value type 99"),
        (one("k", 9, ARRAY(9, 1) * 5), "arrays nested more than 4 deep"),
        (one("k", 9, ARRAY(9, 10**9)), "entries announced"),
        (header(pairs=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2, "key 'k' stands twice"),
        (one("general.alignment", 4, struct.pack("<I", 48)), "general.alignment is 48, not a power of two"),
        (one("general.alignment", 4, struct.pack("<I", 0)), "general.alignment is 0"),
        (one("general.alignment", 8, text("32")), "general.alignment is '32'"),
        (one("split.count", 2, struct.pack("<H", 3)), "one part of a split GGUF file; join the parts"),
        (header(tensors=1) + tensor(shape=(1,) * 5), "tensor 't': 5 dimensions"),
        (header(tensors=1) + tensor(kind=4), r"tensor 't': type 4 cannot be read; those that can: F32"),
        (header(tensors=1) + tensor(kind=9), r"type 9 \(Q8_1\) cannot be read"),
        (header(tensors=1) + tensor(shape=(2**40, 2**40)), "impossible shape"),
        (header(tensors=1) + tensor(shape=(0, 2**60)), "impossible shape"),
        (header(tensors=1) + tensor(shape=(33,), kind=8), "are no multiple of Q8_0's block, 32"),
        (header(tensors=1) + tensor(shape=(), kind=8), r"rows of shape \(\) are no multiple"),
        (header(tensors=1) + tensor(offset=1) + bytes(100), "offset 1 is no multiple of the alignment, 32"),
        (header(tensors=1) + tensor(shape=(100,)) + bytes(64), r"tensor 't' ends at byte 464 of 121"),
        (header(tensors=1) + tensor(offset=2**63), "ends at byte"),
        (header(tensors=2) + tensor() * 2 + bytes(99), "tensor 't' stands twice"),
        (header(tensors=2) + tensor("a", (9,)) + tensor("b", (9,)) + bytes(99), "'b' overlaps"),
    ],
)  # fmt: skip
def test_bad_file(tmp_path, content, message):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"bad.gguf: .*{message}"):
        open_file(tmp_path / "bad.gguf")


def test_problems_of_tensors_are_listed_together(tmp_path):
    (tmp_path / "f").write_bytes(header(tensors=2) + tensor("a", kind=4) + tensor("b", shape=(999,)))
    with pytest.raises(CheckpointError) as error:
        open_file(tmp_path / "f")
    assert len(error.value.problems) == 2


def test_every_truncation_is_refused(tmp_path):
    """The last byte of data included; only padding may be missing."""
    write(tmp_path / "f.gguf", METADATA, [("t", (8,), "F32", values(8))])
    content = (tmp_path / "f.gguf").read_bytes()
    for size in [*range(0, len(content), 9), len(content) - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_file(tmp_path / "cut.gguf")


def test_version_2_reads_alike(tmp_path):
    write(tmp_path / "f.gguf", METADATA, [("t", (8,), "F32", values(8))])
    content = bytearray((tmp_path / "f.gguf").read_bytes())
    content[4] = 2
    (tmp_path / "f.gguf").write_bytes(content)
    np.testing.assert_array_equal(open_file(tmp_path / "f.gguf")["t"].read(), values(8))
