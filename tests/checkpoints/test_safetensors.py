"""Our reader and writer against the `safetensors` library, and every way in which a file can be wrong."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.safetensors import INDEX, SINGLE, open_directory, open_file, write

DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
    "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32,
    "F64": np.float64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name.lower(): rng.integers(1, 3, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    return made | {
        "é 'quoted\" \\": rng.standard_normal(7),
        "scalar": np.full((), 3.5, np.float32),
        "none": np.ones((0, 4)),
    }


def raw_file(path: Path, header: bytes | dict, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    expected = arrays()
    safetensors.numpy.save_file(expected, tmp_path / SINGLE, {"format": "pt"})
    with open_directory(tmp_path) as source:
        assert set(source) == set(expected)
        assert source.metadata == {"format": "pt"}
        for name, array in expected.items():
            assert source[name].shape == array.shape
            assert source[name].nbytes == array.nbytes
            np.testing.assert_array_equal(source[name].read(), array, strict=True)
        assert {source[name.lower()].storage for name in DTYPES} == set(DTYPES)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_writes_what_the_library_writes(tmp_path, metadata):
    write(tmp_path, [(name, a.shape, a.dtype, a) for name, a in arrays().items()], metadata)
    assert (tmp_path / SINGLE).read_bytes() == safetensors.numpy.save(arrays(), metadata)


def test_sharded_round_trip(tmp_path):
    """Ten tensors of 400 bytes, at most 1,000 bytes a file; a larger one has a file to itself."""
    expected = {f"layers.{i}": np.full((10, 10), i, np.float32) for i in range(10)}
    expected["layers.9"] = np.ones((30, 10), np.float32)
    alive = []

    def make(name: str):
        alive.append(name)
        return expected[name]

    specs = [(name, a.shape, a.dtype, lambda name=name: make(name)) for name, a in expected.items()]
    write(tmp_path, specs, {"format": "pt"}, max_shard_bytes=1000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    assert alive == list(expected)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected.values())
    for shard in shards:  # the library reads them, and the index is right
        with safetensors.safe_open(tmp_path / shard, "np") as file:
            assert {name for name, at in index["weight_map"].items() if at == shard} == set(file.keys())
            assert file.metadata() == {"format": "pt"}
    with open_directory(tmp_path) as source:
        assert set(source) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(source[name].read(), array, strict=True)


def test_a_tensor_that_the_index_leaves_out_is_kept(tmp_path):
    write(tmp_path, [(name, (1,), np.float32, np.ones(1, np.float32)) for name in "ab"], max_shard_bytes=4)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["b"]
    index["weight_map"]["c"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor 'c' is not in 'model-00002-of-00002.safetensors'"):
        open_directory(tmp_path)
    index["weight_map"].pop("c")
    safetensors.numpy.save_file(
        {"a": np.ones(1), "b": np.ones(1)}, tmp_path / "model-00001-of-00002.safetensors"
    )
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert sorted(open_directory(tmp_path)) == ["a", "b"]


def test_shard_problems_are_listed_together(tmp_path):
    raw_file(tmp_path / "bad.safetensors", b"[]")
    safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "good.safetensors")
    places = {
        "a": "../evil.safetensors",
        "b": "gone.safetensors",
        "c": "bad.safetensors",
        "d": "good.safetensors",
    }
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError) as error:
        open_directory(tmp_path)
    assert error.value.problems == [
        "the index names '../evil.safetensors', which is no safetensors file of this directory",
        "bad.safetensors: no safetensors file: its header does not start with '{'",
        "shard 'gone.safetensors' is missing",
        "tensor 'd' is not in 'good.safetensors', where the index puts it",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "\xff"])
def test_bad_index(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(
        CheckpointError, match=r"index.json: (no weight_map|not valid JSON|the file is empty)"
    ):
        open_directory(tmp_path)


@pytest.mark.parametrize("shard", ["/etc/passwd", "..", ".", "", "a/b.safetensors", "model.bin"])
def test_index_cannot_leave_its_directory(tmp_path, shard):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is no safetensors file of this directory"):
        open_directory(tmp_path)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin: a pickle can run any code when it is opened"
    ):
        open_directory(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_directory(tmp_path)


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "does not start with '{'"),
        (b"x", b"", "does not start with '{'"),
        (b"{", b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (DEEP, b"", "not valid JSON"),
        (b'{"\\ud800": {}}', b"", "not valid JSON"),
        (b'{"__metadata__": {"a": "\\ud800"}}', b"", "not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "key 'a' stands twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "key 'dtype' stands twice"),
        ({"a": []}, b"", "tensor 'a': no dtype, shape and two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "tensor 'a': no dtype"),
        ({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 8]}}, b"", "tensor 'a': no dtype"),
        ({"a": {**entry([1], 0, 4), "data_offsets": ["0", 4]}}, b"", "tensor 'a': no dtype"),
        ({"a": entry([1], 0, 4, "F4")}, bytes(4), "dtype 'F4' is none of BOOL"),
        ({"a": entry([-1], 0, 4)}, bytes(4), "impossible shape"),
        ({"a": entry([1.0], 0, 4)}, bytes(4), "impossible shape"),
        ({"a": entry([True], 0, 4)}, bytes(4), "impossible shape"),
        ({"a": entry([1] * 40, 0, 4)}, bytes(4), "impossible shape"),
        ({"a": entry([0, 2**60], 0, 0)}, b"", "impossible shape"),
        ({"a": entry([2**40, 2**40], 0, 4)}, bytes(4), "impossible shape"),
        ({"a": entry([2], 0, 4)}, bytes(4), r"F32 \[2\] does not fill the bytes 0 to 4"),
        ({"a": entry([1], -4, 0)}, bytes(4), "does not fill"),
        ({"a": entry([1], 4, 0)}, bytes(4), "does not fill"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), r"'b' starts at byte \d+, not \d+"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), r"'b' starts at byte \d+, not \d+"),
        ({"a": entry([2], 0, 8)}, bytes(7), r"truncated: the header describes \d+ bytes, the file has \d+"),
        ({"a": entry([1], 0, 4)}, bytes(5), "too long: the header describes"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings"),
        ({"__metadata__": []}, b"", "__metadata__ must map strings to strings"),
    ],
)  # fmt: skip
def test_bad_header(tmp_path, header, data, message):
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"bad.safetensors: .*{message}"):
        open_file(path)
    if "F4" not in message and "impossible" not in message:  # elsewhere no stricter than the library
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize(
    "content",
    [
        b"\1",
        b"\0" * 7,
        b"\0" * 8,
        (100).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        b"\xff" * 7 + b"\x7f{}",
    ],
)
def test_bad_length(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_file(tmp_path / "bad.safetensors")


def test_problems_of_a_header_are_listed_together(tmp_path):
    bad = raw_file(
        tmp_path / "f", {"a": entry([1], 0, 4, "X"), "b": entry([-1], 0, 4), "c": entry([1], 0, 4)}, bytes(4)
    )
    with pytest.raises(CheckpointError) as error:
        open_file(bad)
    assert len(error.value.problems) == 2


def test_write_refuses(tmp_path):
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="'a' is written twice"):
        write(tmp_path, [("a", (1,), np.float32, one)] * 2)
    with pytest.raises(ValueError, match="'a': complex64 has no safetensors name; those that have: BOOL"):
        write(tmp_path, [("a", (1,), np.complex64, one)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"tensor 'a' is float32\(1,\), announced as float16\(1,\)"):
        write(tmp_path, [("a", (1,), np.float16, one)])
