"""Reading pieces of mapped tensors within their memory."""

import os
import pickle
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxopt_llm.checkpoints import blocks, files
from jaxopt_llm.checkpoints.files import CheckpointError, MappedFile, Tensor
from tests.forks import forks, in_child


def stored(path: Path, raw: np.ndarray, storage: str, shape: tuple[int, ...], offset: int = 3) -> Tensor:
    """A tensor whose bytes lie at an odd offset of a file."""
    path.write_bytes(b"\0" * offset + raw.tobytes())
    dtype = np.dtype(np.float32) if storage in blocks.SIZES else raw.dtype
    return Tensor("w", storage, dtype, shape, MappedFile(path), offset)


INDICES = [
    (),
    slice(2, 5),
    (slice(2, 5),),
    (slice(None), slice(3, 9)),
    (slice(None), slice(None), slice(32, 64)),
    (slice(1, 2), slice(0, 9), slice(5, 70)),
    (slice(4, 4), slice(None), slice(7, 7)),
    (slice(-2, None), slice(3, 1)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("chunk", [64, 4 << 20])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.bool_])
def test_read_is_numpy_indexing(tmp_path, monkeypatch, index, chunk, dtype):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    values = (np.random.default_rng(0).standard_normal((6, 9, 96)) * 9).astype(dtype)
    got = stored(tmp_path / "f", values, "plain", values.shape).read(index)
    np.testing.assert_array_equal(got, values[index])
    assert got.dtype == dtype
    assert got.size == 0 or got.ctypes.data % 64 == 0
    assert got.flags.writeable


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("chunk", [64, 4 << 20])
@pytest.mark.parametrize("storage", ["Q8_0", "Q5_1"])
def test_read_of_blocks_is_indexing_of_values(tmp_path, monkeypatch, index, chunk, storage):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    raw = np.random.default_rng(0).integers(0, 64, (6, 9, 3 * blocks.SIZES[storage][1]), np.uint8)
    got = stored(tmp_path / "f", raw, storage, (6, 9, 96)).read(index)
    np.testing.assert_array_equal(got, blocks.dequantize(raw, storage)[index])


@pytest.mark.parametrize("storage", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("chunk", [64, 4 << 20])
def test_native_is_indexing_of_codes_and_scales(tmp_path, monkeypatch, storage, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    elements, nbytes = blocks.SIZES[storage]
    raw = np.random.default_rng(0).integers(0, 64, (5, 4, 3 * nbytes), np.uint8)
    tensor = stored(tmp_path / "f", raw, storage, (5, 4, 3 * elements))
    whole, group = blocks.native(raw, storage), blocks.native_form(storage).group
    for columns in [slice(None), slice(group, 2 * elements), slice(2 * group, 2 * group)]:
        got = tensor.native((slice(1, 4), slice(None), columns))
        for part, all_of_it in zip(got, whole, strict=True):
            if part is not None and all_of_it is not None:
                start, stop, _ = columns.indices(3 * elements)
                per = 3 * elements // all_of_it.shape[-1]
                np.testing.assert_array_equal(part, all_of_it[1:4, :, start // per : stop // per])
                assert part.size == 0 or part.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match=f"must be multiples of the group, {group}"):
        tensor.native((slice(None), slice(None), slice(0, group + 1)))


def test_scalars_vectors_and_empty_tensors(tmp_path):
    assert stored(tmp_path / "a", np.float32(7), "F32", ()).read() == 7
    vector = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(stored(tmp_path / "b", vector, "F32", (8,)).read(slice(2, 4)), [2, 3])
    assert stored(tmp_path / "c", vector[:0], "F32", (4, 0, 2)).read(slice(1, 3)).shape == (2, 0, 2)


def test_read_converts(tmp_path):
    values = np.array([1.0, -2.5, 65504.0], ml_dtypes.bfloat16)[:2]
    tensor = stored(tmp_path / "f", values, "BF16", (2,))
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        got = tensor.read(dtype=dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(np.float32), [1.0, -2.5])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_float16_does_not_overflow_silently(tmp_path, dtype):
    tensor = stored(tmp_path / "f", np.array([1e6], dtype), "x", (1,))
    with pytest.raises(CheckpointError, match=r"tensor 'w' has values beyond float16; load it as float32"):
        tensor.read(dtype=np.float16)
    unbounded = stored(tmp_path / "g", np.array([np.inf, np.nan], dtype), "x", (2,))
    np.testing.assert_array_equal(unbounded.read(dtype=np.float16), np.array([np.inf, np.nan], np.float16))


@pytest.mark.parametrize("index", [(slice(0, 4, 2),), (slice(None),) * 3])
def test_read_refuses_other_indices(tmp_path, index):
    tensor = stored(tmp_path / "f", np.zeros((4, 4), np.float32), "F32", (4, 4))
    with pytest.raises(ValueError, match="must be slices of step 1"):
        tensor.read(index)


def test_mapped_file_refuses_what_it_cannot_map(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="empty: the file is empty"):
        MappedFile(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not a regular file"):
        MappedFile(tmp_path / "pipe")  # without waiting for a writer
    with pytest.raises(CheckpointError, match="not a regular file"):
        MappedFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "absent")


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path):
    tensor = stored(tmp_path / "f", np.zeros(100_000, np.float32), "F32", (100_000,))
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(CheckpointError, match="the file shrank from 400003 bytes"):
        tensor.read()


@forks
@pytest.mark.parametrize(
    ("storage", "call"),
    [
        ("F32", lambda tensor: [tensor.read()]),
        ("F32", lambda tensor: [tensor.read((slice(None), slice(0, 512)))]),
        ("F32", lambda tensor: [tensor.read(dtype=ml_dtypes.bfloat16)]),
        ("Q8_0", lambda tensor: [tensor.read()]),
        ("Q4_K", lambda tensor: tensor.native()),
    ],
)
def test_peak_memory_of_a_read(tmp_path, storage, call):
    """Resident memory grows by the result and a few pieces, not by the file."""
    rows, columns = 49_152, 1024
    elements, nbytes = blocks.SIZES.get(storage, (1, 4))
    with open(tmp_path / "f", "wb") as file:
        file.truncate(rows * columns // elements * nbytes)
    tensor = Tensor("w", storage, np.dtype(np.float32), (rows, columns), MappedFile(tmp_path / "f"), 0)

    def measure() -> None:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        result = sum(array.nbytes for array in call(tensor) if array is not None)
        grown = peak() - before
        assert 0.5 * result < grown < result + 32e6, (result, grown)

    assert in_child(measure) == 0


def test_error_lists_all_problems_in_one_line():
    error = CheckpointError("model", ["a is bad", "b is worse"])
    assert str(error) == "model: a is bad; b is worse"
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    many = CheckpointError("model", [f"p{i}" for i in range(70)])
    assert str(many).endswith("p49; and 20 more")
    assert len(str(CheckpointError("model", "x" * 10**6))) < 3000


def test_remote_files_cannot_be_mapped():
    with pytest.raises(CheckpointError, match="mapped from a local disk; copy it to one first"):
        files.local_path("gs://bucket/model.gguf")
