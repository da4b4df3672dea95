"""safetensors files, single or sharded: a strict reader over a map, and a writer with one tensor in memory.

Format: https://huggingface.co/docs/safetensors
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxopt_llm.checkpoints.files import (
    CheckpointError,
    MappedFile,
    Tensor,
    TensorSource,
    TensorSpec,
    local_path,
    refuse_pickles,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_DIMS = 32

_DTYPES: dict[str, np.dtype] = {  # in the order in which the reference library lays tensors out, last first
    name: np.dtype(dtype)
    for name, dtype in (
        ("BOOL", np.bool_),
        ("U8", np.uint8),
        ("I8", np.int8),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("I16", np.int16),
        ("U16", np.uint16),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("I32", np.int32),
        ("U32", np.uint32),
        ("F32", np.float32),
        ("F64", np.float64),
        ("I64", np.int64),
        ("U64", np.uint64),
    )
}
_RANK = {dtype: (rank, name) for rank, (name, dtype) in enumerate(_DTYPES.items())}


def open_directory(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
      CheckpointError: if neither is there, or any file or tensor is not as its header or the index says.
    """
    path = local_path(path)
    if (path / SINGLE).exists():
        return open_file(path / SINGLE)
    if (path / INDEX).exists():
        return _open_sharded(path)
    refuse_pickles(path)
    raise CheckpointError(path, f"neither {SINGLE} nor {INDEX} is in this directory")


def open_file(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors of one safetensors file."""
    file = MappedFile(local_path(path))
    try:
        tensors, metadata = _parse(file)
    except CheckpointError:
        file.close()
        raise
    return TensorSource(path, tensors, [file], metadata)


def _open_sharded(directory: Path) -> TensorSource:
    weight_map = _read_index(directory / INDEX)
    shards: dict[str, TensorSource] = {}
    problems: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            problems.append(f"the index names {shard!r}, which is no safetensors file of this directory")
        elif not os.path.exists(directory / shard):  # Path.exists raises for a name that is too long
            problems.append(f"shard {shard!r} is missing")
        else:
            try:
                shards[shard] = open_file(directory / shard)
            except CheckpointError as error:
                problems += [f"{shard}: {problem}" for problem in error.problems]
    problems += [
        f"tensor {name!r} is not in {shard!r}, where the index puts it"
        for name, shard in weight_map.items()
        if shard in shards and name not in shards[shard]
    ]
    files = [file for source in shards.values() for file in source.files]
    if problems:
        for file in files:
            file.close()
        raise CheckpointError(directory, problems)
    # A tensor that the index leaves out is kept, as transformers does: the model will call it unexpected.
    tensors = {name: tensor for source in shards.values() for name, tensor in source.items()}
    tensors |= {name: shards[shard][name] for name, shard in weight_map.items()}
    metadata = {key: value for source in shards.values() for key, value in source.metadata.items()}
    return TensorSource(directory, tensors.values(), files, metadata)


def _read_index(path: Path) -> dict[str, str]:
    file = MappedFile(path)
    text = file.map[:_MAX_HEADER]
    file.close()
    index = _load_json(path, text)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(path, "no weight_map from tensor names to file names")
    return weight_map


def _parse(file: MappedFile) -> tuple[list[Tensor], dict[str, str]]:
    length = int.from_bytes(file.map[:8], "little")
    if file.size < 8 or length > min(_MAX_HEADER, file.size - 8):
        raise CheckpointError(
            file.path,
            f"no safetensors file, or a truncated one: a header of {length} bytes (at most {_MAX_HEADER}) "
            f"in a file of {file.size}",
        )
    text = file.map[8 : 8 + length]
    if not text.startswith(b"{"):
        raise CheckpointError(file.path, "no safetensors file: its header does not start with '{'")
    header = _load_json(file.path, text)
    metadata = header.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ must map strings to strings")
    start = 8 + length
    tensors = [_tensor(file, start, name, entry, problems) for name, entry in header.items()]
    found = sorted((t for t in tensors if t is not None), key=lambda t: (t.offset, t.nbytes))
    problems = problems or list(_layout_problems(file, start, found))
    if problems:
        raise CheckpointError(file.path, problems)
    return found, metadata


def _tensor(file: MappedFile, start: int, name: str, entry: Any, problems: list[str]) -> Tensor | None:
    """The tensor that a header's entry describes, or none and a problem more."""
    match entry:
        case {"dtype": str(storage), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            problems.append(f"tensor {name!r}: no dtype, shape and two data_offsets")
            return None
    if storage not in _DTYPES:
        problems.append(f"tensor {name!r}: dtype {storage!r} is none of {', '.join(_DTYPES)}")
    elif not _possible(shape):
        problems.append(f"tensor {name!r}: impossible shape {str(shape)[:80]}")
    elif math.prod(shape) * _DTYPES[storage].itemsize != end - begin or begin < 0:
        problems.append(f"tensor {name!r}: {storage} {shape} does not fill the bytes {begin} to {end}")
    else:
        return Tensor(name, storage, _DTYPES[storage], tuple(shape), file, start + begin)
    return None


def _possible(shape: list[Any]) -> bool:
    sizes = [size or 1 for size in shape if type(size) is int and size >= 0]
    return (
        len(sizes) == len(shape) <= _MAX_DIMS and math.prod(sizes) < 2**56
    )  # else NumPy cannot hold even the view


def _layout_problems(file: MappedFile, start: int, tensors: Sequence[Tensor]) -> Iterator[str]:
    """Tensors, sorted, must follow one another without gap or overlap, to the end of the file."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            yield f"tensor {tensor.name!r} starts at byte {tensor.offset}, not {end} (a gap or an overlap)"
        end = max(end, tensor.offset + tensor.nbytes)
    if end != file.size:
        cut = "truncated" if end > file.size else "too long"
        yield f"{cut}: the header describes {end} bytes, the file has {file.size}"


def _load_json(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise CheckpointError(path, f"not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"key {name!r} stands twice")
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # half a surrogate pair, which JSON can spell, raises a ValueError
        result[name] = value
    return result


def write(
    directory: str | os.PathLike[str],
    tensors: Iterable[TensorSpec],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model.safetensors`, or shards and their index, into a directory (see `atomic.atomic_directory`).

    Args:
      tensors: (name, shape, dtype, array or function that makes it). A function is called when its turn to be
        written comes and its result dropped after, so that one tensor at a time is in memory.
      metadata: of each file. transformers wants `{"format": "pt"}`.
      max_shard_bytes: of tensor data in a file; a single larger tensor has a file to itself.

    Raises:
      ValueError: if a name stands twice, a dtype has no safetensors name, or an array is not as announced.
    """
    directory, metadata = Path(directory), dict(metadata or {})
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_path(directory / SINGLE, shards[0], metadata)
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _write_path(directory / file, shard, metadata)
    index = {
        "metadata": {"total_size": sum(_nbytes(spec) for shard in shards for spec in shard)},
        "weight_map": {spec[0]: file for file, shard in zip(files, shards, strict=True) for spec in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec[1]) * np.dtype(spec[2]).itemsize


def _split(tensors: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in files of at most `max_bytes`, in their order."""
    shards: list[list[TensorSpec]] = [[]]
    names: set[str] = set()
    size = 0
    for spec in tensors:
        name, _, dtype, _ = spec
        if name in names or name == "__metadata__":
            raise ValueError(f"tensor {name!r} is written twice, or has a name that the format reserves")
        if np.dtype(dtype) not in _RANK:
            raise ValueError(
                f"tensor {name!r}: {np.dtype(dtype)} has no safetensors name; "
                f"those that have: {', '.join(_DTYPES)}"
            )
        names.add(name)
        if shards[-1] and size + _nbytes(spec) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += _nbytes(spec)
    return shards


def _write_path(path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    with open(path, "wb") as file:
        write_file(file, tensors, metadata)


def write_file(file: BinaryIO, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file, with arguments as `write` has them.

    Byte for byte what the reference library writes: widest types first, then by name; padded to 8.
    """
    tensors = sorted(tensors, key=lambda spec: (-_RANK[np.dtype(spec[2])][0], spec[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in tensors:
        begin, end = end, end + _nbytes(spec)
        header[spec[0]] = {
            "dtype": _RANK[np.dtype(spec[2])][1],
            "shape": list(spec[1]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape, dtype, value in tensors:
        array = np.asarray(value() if callable(value) else value)
        if array.shape != tuple(shape) or array.dtype != dtype:
            due = f"{np.dtype(dtype)}{tuple(shape)}"
            raise ValueError(f"tensor {name!r} is {array.dtype}{array.shape}, announced as {due}")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array
