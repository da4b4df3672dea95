"""Tensors that lie in mapped files, read piece by piece."""

import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxopt_llm.checkpoints import blocks

Index = slice | tuple[slice, ...]
TensorSpec = tuple[
    str, Sequence[int], Any, Any
]  # to be written: name, shape, dtype, an array or a function making it

_ALIGNMENT = 64  # bytes; JAX on the CPU adopts an array so aligned without a copy
_CHUNK = 4 << 20  # bytes of a file read before their pages are given back
_FOLIO = 2 << 20  # bytes; with a page that is touched Linux maps the folio it lies in, at most so large
_MOST_PROBLEMS = 50  # listed in one message
_LONGEST_PROBLEM = 2000  # characters: a hostile name may have millions
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file and lists every problem found.

    Args:
      source: the file or directory.
      problems: one, or several; all stand in the one-line message.
    """

    def __init__(self, source: str | os.PathLike[str], problems: str | Sequence[str]):
        super().__init__(source, problems)
        self.source = source
        self.problems = [problems] if isinstance(problems, str) else list(problems)

    def __str__(self) -> str:
        listed = "; ".join(problem[:_LONGEST_PROBLEM] for problem in self.problems[:_MOST_PROBLEMS])
        more = len(self.problems) - _MOST_PROBLEMS
        return f"{os.fspath(self.source)}: {listed}" + (f"; and {more} more" if more > 0 else "")


def local_path(path: str | os.PathLike[str]) -> Path:
    """Raises CheckpointError if it is remote: only a local file can be mapped."""
    if "://" in os.fspath(path):
        raise CheckpointError(
            path,
            "safetensors and GGUF files are mapped from a local disk; copy it to one first "
            "(for gs://, with `gcloud storage cp -r`)",
        )
    return Path(path)


def refuse_pickles(path: Path) -> None:
    """Raises CheckpointError if `path` is a pickle, or a directory that holds some."""
    inside = path.iterdir() if path.is_dir() else [path]
    if pickles := sorted(file.name for file in inside if file.suffix.lower() in _PICKLES):
        raise CheckpointError(
            path,
            f"{', '.join(pickles)}: a pickle can run any code when it is opened, so none ever is; "
            "save it as safetensors, with transformers' save_pretrained where you trust it",
        )


def aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array whose first byte lies on a multiple of 64."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(shape)


class MappedFile:
    """A local file mapped read-only, whose pages can be given back after use."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with open(path, "rb", opener=_open_regular) as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise CheckpointError(path, "the file is empty")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._base = np.frombuffer(self.map, np.uint8, 1).ctypes.data

    def array(self, offset: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A view of the map. It must not outlive a use: `close` waits for it."""
        if self.map.size() < self.size:  # touching a page past the end would kill the process
            raise CheckpointError(
                self.path, f"the file shrank from {self.size} bytes while it was being read"
            )
        return np.ndarray(shape, dtype, buffer=self.map, offset=offset)

    def release(self, view: np.ndarray) -> None:
        """Gives back the pages behind a view, so that resident memory does not grow with the file."""
        if view.size and hasattr(mmap, "MADV_DONTNEED"):
            low, high = (address - self._base for address in np.lib.array_utils.byte_bounds(view))
            start, stop = low // _FOLIO * _FOLIO, -(-high // _FOLIO) * _FOLIO
            self.map.madvise(mmap.MADV_DONTNEED, start, min(stop, self.size) - start)

    def close(self) -> None:
        with suppress(
            BufferError
        ):  # a view is still alive, in a traceback perhaps: the map goes when it does
            self.map.close()


def _open_regular(path: str, flags: int) -> int:
    """Opens without ever waiting for the other end of a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(path, "not a regular file")
    return descriptor


@dataclass(frozen=True)
class Tensor:
    """A tensor in a mapped file. Nothing is read before `read` or `native`.

    Attributes:
      name: as in the file.
      storage: how it is stored, in its format's own word: "BF16", "F8_E4M3", "Q4_K".
      dtype: of the values that `read` returns unless told otherwise; float32 for block types.
      shape: row-major, `[out, in]` for a weight (GGUF writes it the other way round).
    """

    name: str
    storage: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: MappedFile = field(repr=False)
    offset: int = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        elements, nbytes = blocks.SIZES.get(self.storage, (1, self.dtype.itemsize))
        return math.prod(self.shape) // elements * nbytes

    def read(self, index: Index = (), dtype: Any = None) -> np.ndarray:
        """The values at `index`, dequantized if need be, in a fresh array aligned to 64 bytes.

        Args:
          index: a slice an axis, as `jax.make_array_from_callback` hands them; axes left out are whole. Only
            the rows and columns asked for are read (of a block type, the blocks they lie in).
          dtype: of the result; None for the tensor's own.

        Raises:
          CheckpointError: if a value is beyond the range of float16, where that was asked for.
        """
        bounds = self._bounds(index)
        out = aligned([stop - start for start, stop in bounds], dtype or self.dtype)
        stored, columns = self._stored(bounds)
        for piece, part in self._parts(stored):
            values = blocks.dequantize(part, self.storage)[..., columns] if self._blocked else part
            try:
                _assign(out, piece, values)
            except FloatingPointError:
                raise CheckpointError(
                    self.file.path, f"tensor {self.name!r} has values beyond float16; load it as float32"
                ) from None
        return out

    def native(self, index: Index = ()) -> blocks.NativeBlocks:
        """The codes and scales at `index` as the file holds them; see `blocks.native`.

        Raises:
          ValueError: if the type has no native form, or columns would cut a group that shares a scale.
        """
        form, (elements, nbytes) = blocks.native_form(self.storage), blocks.SIZES[self.storage]
        bounds = self._bounds(index)
        *rows, width = [stop - start for start, stop in bounds]
        if any(column % form.group for column in bounds[-1]):
            raise ValueError(
                f"{self.name}: columns {bounds[-1]} must be multiples of the group, {form.group}"
            )
        out = form.allocate(aligned, rows, width)
        stored, columns = self._stored(bounds)
        for piece, part in self._parts(stored):
            for target, values in zip(out, blocks.native(part, self.storage), strict=True):
                if target is not None and values is not None:
                    per = part.shape[-1] // nbytes * elements // values.shape[-1]  # elements to an entry
                    target[piece] = values[..., columns.start // per : columns.stop // per]
        return out

    @property
    def _blocked(self) -> bool:
        return self.storage in blocks.SIZES

    def _bounds(self, index: Index) -> list[tuple[int, int]]:
        given = index if isinstance(index, tuple) else (index,)
        if len(given) > len(self.shape) or any(s.step not in (None, 1) for s in given):
            raise ValueError(f"{self.name}: index {index} must be slices of step 1 into shape {self.shape}")
        whole = (slice(None),) * (len(self.shape) - len(given))
        limits = [s.indices(size) for s, size in zip(given + whole, self.shape, strict=True)]
        return [(start, max(start, stop)) for start, stop, _ in limits]

    def _stored(self, bounds: list[tuple[int, int]]) -> tuple[np.ndarray, slice]:
        """A view of what the file holds at `bounds`, and the columns still to cut from its values."""
        index: list[Any] = [slice(*bound) for bound in bounds]
        if not self._blocked:
            whole = self.file.array(self.offset, self.shape, self.dtype)
            return whole[(*index, ...)], slice(None)
        elements, nbytes = blocks.SIZES[self.storage]
        (start, stop), width = bounds[-1], self.shape[-1]
        first, last = start // elements, -(-stop // elements)
        index[-1] = slice(first * nbytes, last * nbytes)
        raw = self.file.array(self.offset, (*self.shape[:-1], width // elements * nbytes), np.uint8)
        return raw[tuple(index)], slice(start - first * elements, stop - first * elements)

    def _parts(self, stored: np.ndarray) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """(index, view) of each piece in turn; a piece's pages are given back when the next is asked for."""
        axes, limit = stored.ndim, _CHUNK
        if self._blocked:  # rows stay whole, and a piece in float32 stays in the processor's cache
            elements, nbytes = blocks.SIZES[self.storage]
            axes, limit = stored.ndim - 1, _CHUNK // 16 * nbytes // elements
        for piece in _pieces(stored.shape[:axes], stored.strides, limit) if stored.size else ():
            part = stored[piece]
            yield piece, part
            self.file.release(part)


def _pieces(shape: Sequence[int], strides: Sequence[int], limit: int) -> Iterator[tuple[Any, ...]]:
    """Indices that tile an array of `shape` in pieces that span `limit` bytes, or else a single row."""
    if not shape:
        yield (...,)  # which leaves a scalar an array
    elif strides[0] > limit and len(shape) > 1:
        for row in range(shape[0]):
            for rest in _pieces(shape[1:], strides[1:], limit):
                yield slice(row, row + 1), *rest
    else:
        step = max(1, limit // strides[0])
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)


def _assign(out: np.ndarray, piece: tuple[Any, ...], values: np.ndarray) -> None:
    if out.dtype == np.float16 and values.dtype == ml_dtypes.bfloat16:
        values = values.astype(np.float32)  # the cast from bfloat16 itself does not report an overflow
    with np.errstate(invalid="ignore", over="raise"):
        out[piece] = values


class TensorSource(Mapping[str, Tensor], AbstractContextManager):
    """The tensors of a checkpoint by name, in the order of the file, with its metadata.

    Closing it, or leaving it as a context manager, unmaps the files; its tensors cannot be read then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Iterable[Tensor],
        files: Sequence[MappedFile],
        metadata: Mapping[str, Any],
    ):
        self.path = Path(path)
        self.metadata = dict(metadata)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __exit__(self, *_: object) -> None:
        self.close()
