"""GGUF files: a strict header reader over a map, and a streaming writer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from jaxopt_llm.checkpoints import blocks
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.checkpoints.files import (
    CheckpointError,
    MappedFile,
    Tensor,
    TensorSource,
    TensorSpec,
    local_path,
)

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32  # bytes, where general.alignment does not say otherwise
_MAX_DIMS = 4
_MAX_DEPTH = 4  # of arrays of arrays
_CHUNK = 4 << 20  # bytes of values converted at a time

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8"),
        strict=True,
    )
}
_CODES = {dtype: code for code, dtype in _SCALARS.items()}

_TYPES = {member.value: member.name for member in GGMLQuantizationType}
_PLAIN: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


def open_file(path: str | os.PathLike[str]) -> TensorSource:
    """The tensors and metadata (plain Python values by key) of a GGUF file of version 2 or 3.

    Raises:
      CheckpointError: if anything in the header is not as the format wants it, or reaches past the end.
    """
    file = MappedFile(local_path(path))
    try:
        return _Reader(file).read()
    except CheckpointError:
        file.close()
        raise


class _Reader:
    """A cursor over a GGUF header; every count is held against the bytes left before it is believed."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.map = file.map
        self.position = 0

    def read(self) -> TensorSource:
        if self.map[:4] != _MAGIC:
            raise self.error("no GGUF file: it does not start with 'GGUF'")
        self.position = 4
        version = self.number("<I")
        if version not in (2, _VERSION):
            big = version and version & 0xFFFF == 0
            raise self.error(
                "a big-endian GGUF file"
                if big
                else f"GGUF version {version}; 2 and 3 can be read: convert it anew"
            )
        tensors, pairs = self.count(24), self.count(13)  # bytes of the shortest possible entries
        metadata = self.metadata(pairs)
        if metadata.get("split.count", 1) != 1:
            raise self.error("one part of a split GGUF file; join the parts with `llama-gguf-split --merge`")
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, not a power of two")
        entries = [self.tensor_entry() for _ in range(tensors)]
        start = -(-self.position // alignment) * alignment
        found = list(self.tensors(entries, start, alignment))
        self.file.release(self.file.array(0, (self.position,), np.uint8))
        return TensorSource(self.file.path, found, [self.file], metadata)

    def error(self, problems: str | Sequence[str]) -> CheckpointError:
        return CheckpointError(self.file.path, problems)

    def take(self, nbytes: int) -> int:
        """Moves past `nbytes` and returns where they start."""
        start = self.position
        if nbytes > self.file.size - start:
            raise self.error(f"truncated or corrupted: {nbytes} bytes are due at {start} of {self.file.size}")
        self.position = start + nbytes
        return start

    def number(self, form: str) -> int:
        return struct.unpack_from(form, self.map, self.take(struct.calcsize(form)))[0]

    def count(self, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number("<Q")
        if count > (self.file.size - self.position) // least:
            raise self.error(f"truncated or corrupted: {count} entries announced at byte {self.position - 8}")
        return count

    def string(self) -> str:
        length = self.number("<Q")
        start = self.take(length)
        try:
            return str(self.map[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the string at byte {start} is not UTF-8") from None

    def metadata(self, pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            if key in metadata:
                raise self.error(f"key {key!r} stands twice")
            metadata[key] = self.value(self.number("<I"))
        return metadata

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            return self.array(depth=1)
        return self.scalars(code, 1)[0]

    def array(self, depth: int) -> list[Any]:
        code = self.number("<I")
        if code == _STRING:
            return self.strings(self.count(8))
        if code != _ARRAY:
            return self.scalars(code, self.number("<Q"))
        if depth == _MAX_DEPTH:
            raise self.error(f"arrays nested more than {_MAX_DEPTH} deep")
        return [self.array(depth + 1) for _ in range(self.count(12))]

    def scalars(self, code: int, count: int) -> list[Any]:
        if code not in _SCALARS:
            raise self.error(f"unknown value type {code} at byte {self.position}")
        dtype = _SCALARS[code]
        values = self.file.array(self.take(count * dtype.itemsize), (count,), dtype)
        if dtype == np.bool_ and values.view(np.uint8).max(initial=0) > 1:
            raise self.error(f"a truth value before byte {self.position} is neither 0 nor 1")
        return values.tolist()

    def strings(self, count: int) -> list[str]:
        """As `string` repeated, without its calls: a vocabulary has a quarter of a million."""
        data, position, size = self.map, self.position, self.file.size
        unpack = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self.error(f"truncated or corrupted: a string at byte {start} ends past the file")
                result.append(str(data[start:position], "utf-8"))
        except (UnicodeDecodeError, struct.error):
            raise self.error(f"the string at byte {start} is truncated or not UTF-8") from None
        self.position = position
        return result

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset); the file lists the fastest axis first."""
        name = self.string()
        dims = self.number("<I")
        if dims > _MAX_DIMS:
            raise self.error(f"tensor {name!r}: {dims} dimensions, at most {_MAX_DIMS} are possible")
        shape = tuple(self.number("<Q") for _ in range(dims))
        return name, shape[::-1], self.number("<I"), self.number("<Q")

    def tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> Iterator[Tensor]:
        problems: list[str] = []
        found: dict[str, Tensor] = {}
        for name, shape, code, offset in entries:
            if name in found:
                problems.append(f"tensor {name!r} stands twice")
            elif problem := _entry_problem(shape, code, offset, alignment):
                problems.append(f"tensor {name!r}: {problem}")
            else:
                storage = _TYPES[code]
                dtype = _PLAIN.get(storage, np.dtype(np.float32))
                found[name] = Tensor(name, storage, dtype, shape, self.file, start + offset)
        end = start
        for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset < end:
                problems.append(f"tensor {tensor.name!r} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
            if end > self.file.size:
                problems.append(
                    f"tensor {tensor.name!r} ends at byte {end} of {self.file.size} (a truncated file?)"
                )
        if problems:
            raise self.error(problems)
        yield from found.values()


def _entry_problem(shape: tuple[int, ...], code: int, offset: int, alignment: int) -> str:
    storage = _TYPES.get(code, "")
    if storage not in _PLAIN and storage not in blocks.SIZES:
        known = ", ".join([*_PLAIN, *blocks.SIZES])
        return f"type {code}{storage and f' ({storage})'} cannot be read; those that can: {known}"
    if math.prod(size or 1 for size in shape) >= 2**56:
        return f"impossible shape {shape}"
    elements = blocks.SIZES.get(storage, (1, 0))[0]
    if elements > 1 and (not shape or shape[-1] % elements):
        return f"rows of shape {shape} are no multiple of {storage}'s block, {elements}"
    return f"offset {offset} is no multiple of the alignment, {alignment}" if offset % alignment else ""


def write(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> None:
    """Writes a GGUF file in place of `path`, all or nothing, with one tensor in memory at a time.

    Args:
      metadata: by key, a bool, str, float (float32), int (uint32, or int64 where that does not hold it) or a
        list of one of them (of ints: int32); a NumPy scalar or array keeps its own type.
      tensors: (name, shape, type, array or function that makes it). The type is F32, F16, BF16 or Q8_0, and
        the array of a float dtype; or a block type, and the array its blocks, uint8 `[..., bytes of a row]`.

    Raises:
      ValueError: if a name stands twice, a value has no GGUF type, or an array is not as announced.
    """
    tensors = list(tensors)
    alignment = int(metadata.get("general.alignment", _ALIGNMENT))
    header = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        code, data = _encode(value, key)
        header += [_text(key), struct.pack("<I", code), data]
    offset, names = 0, set()
    for name, shape, storage, _ in tensors:
        if name in names:
            raise ValueError(f"tensor {name!r} is written twice")
        names.add(name)
        nbytes = math.prod(shape[:-1]) * _row_bytes(name, shape, storage)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += [_text(name), dims, struct.pack("<IQ", GGMLQuantizationType[storage], offset)]
        offset += -(-nbytes // alignment) * alignment
    with atomic_file(path) as file:
        file.write(b"".join(header))
        _pad(file, alignment)
        for name, shape, storage, value in tensors:
            for piece in _stored(
                name, tuple(shape), storage, np.asarray(value() if callable(value) else value)
            ):
                file.write(piece.reshape(-1).view(np.uint8).data)
            _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encode(value: Any, key: str) -> tuple[int, bytes]:
    """The type code and the bytes of a metadata value."""
    if isinstance(value, str):
        return _STRING, _text(value)
    if isinstance(value, np.ndarray | list | tuple):
        return _ARRAY, _encode_array(value, key)
    if type(value) is int and 0 <= value < 2**32:
        value = np.uint32(value)
    elif type(value) is float:
        value = np.float32(value)
    array = np.asarray(value)
    if array.dtype not in _CODES:
        raise ValueError(f"{key}: {value!r} has no GGUF type")
    return _CODES[array.dtype], array.tobytes()


def _encode_array(values: np.ndarray | list[Any] | tuple[Any, ...], key: str) -> bytes:
    """Element type, length and elements."""
    if not isinstance(values, np.ndarray):
        kinds = {type(value) for value in values}
        if kinds <= {str}:
            return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_text, values))
        if kinds <= {list, tuple}:
            return struct.pack("<IQ", _ARRAY, len(values)) + b"".join(_encode_array(v, key) for v in values)
        if len(kinds) > 1 and kinds != {int, float}:
            raise ValueError(f"{key}: a list of mixed types has no GGUF type")
        values = np.asarray(values)
        if float in kinds:
            values = values.astype(np.float32)
        elif kinds == {int} and values.min() >= -(2**31) and values.max() < 2**31:
            values = values.astype(np.int32)
    if values.ndim != 1 or values.dtype not in _CODES:
        raise ValueError(f"{key}: an array of {values.dtype}{values.shape} has no GGUF type")
    return struct.pack("<IQ", _CODES[values.dtype], len(values)) + values.tobytes()


def _row_bytes(name: str, shape: Sequence[int], storage: str) -> int:
    if not 1 <= len(shape) <= _MAX_DIMS:
        raise ValueError(f"tensor {name!r}: GGUF holds 1 to {_MAX_DIMS} dimensions, not {len(shape)}")
    if storage in _PLAIN:
        return shape[-1] * _PLAIN[storage].itemsize
    if storage not in blocks.SIZES:
        raise ValueError(
            f"tensor {name!r}: unknown type {storage}; known: {', '.join([*_PLAIN, *blocks.SIZES])}"
        )
    elements, nbytes = blocks.SIZES[storage]
    if shape[-1] % elements:
        raise ValueError(
            f"tensor {name!r}: {storage} holds rows of a multiple of {elements}, not {shape[-1]}"
        )
    return shape[-1] // elements * nbytes


def _stored(name: str, shape: tuple[int, ...], storage: str, array: np.ndarray) -> Iterator[np.ndarray]:
    """The array as the file stores it, in pieces of rows."""
    raw = storage in blocks.SIZES and array.dtype == np.uint8
    due = (*shape[:-1], _row_bytes(name, shape, storage)) if raw else shape
    if array.shape != due:
        raise ValueError(f"tensor {name!r} has shape {array.shape}, announced as {due}")
    if not raw and storage not in ("F32", "F16", "BF16", "Q8_0"):
        raise ValueError(f"tensor {name!r}: values can be written as F32, F16, BF16 or Q8_0, not {storage}")
    if not array.size:
        return
    rows = np.ascontiguousarray(array).reshape(-1, due[-1])
    step = max(1, _CHUNK // (due[-1] * rows.itemsize))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        yield part if raw else _convert(part, storage, name)


def _convert(values: np.ndarray, storage: str, name: str) -> np.ndarray:
    try:
        if storage == "Q8_0":
            return blocks.quantize_q8_0(values)
        with np.errstate(over="raise"):
            if storage == "F16" and values.dtype == ml_dtypes.bfloat16:
                values = values.astype(
                    np.float32
                )  # the cast from bfloat16 itself does not report an overflow
            return values.astype(_PLAIN[storage], copy=False)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"tensor {name!r} cannot be written as {storage}: {error}") from None
