"""Parameters on disk: mapped from a file without a name, so that the system holds in memory only what is used."""

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Offload:
    """Arrays in a file that goes when the last of them does, however the process ends.

    Args:
      folder: where the file is, on a disk that has room for all of them; none that lies in memory, as `/tmp` may.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._folder = Path(folder)
        self._used: list[mmap.mmap] = []

    def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array of zeros to be written, which `jax.device_put` adopts without a copy on a CPU.

        Raises:
          OSError: if the disk is full.
        """
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return np.zeros(shape, dtype)
        start = -(-os.fstat(self._file).st_size // mmap.ALLOCATIONGRANULARITY)
        start *= mmap.ALLOCATIONGRANULARITY
        self._reserve(start, nbytes)
        space = mmap.mmap(self._file, nbytes, offset=start)
        self._used.append(space)
        return np.frombuffer(space, dtype).reshape(shape)

    def release(self) -> None:
        """Gives back the memory behind what was written since the last time; what is read of it comes from the disk."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for space in self._used:
                space.madvise(mmap.MADV_DONTNEED)
        self._used.clear()

    def keep(self, tree: Any) -> Any:
        """The same arrays, on disk. Those of an accelerator or a mesh stay where they are."""
        kept = jax.tree.map(self._kept, tree)
        self.release()
        return kept

    def _kept(self, leaf: jax.Array) -> jax.Array:
        if {device.platform for device in leaf.devices()} != {"cpu"} or len(leaf.devices()) > 1:
            return leaf
        space = self.array(leaf.shape, leaf.dtype)
        space[...] = np.asarray(leaf)
        return jax.device_put(space, leaf.sharding)

    def _reserve(self, start: int, nbytes: int) -> None:
        """Space must be there before it is written through a map: without, the system would kill the process."""
        if not hasattr(os, "posix_fallocate"):
            os.truncate(self._file, start + nbytes)
            return
        try:
            os.posix_fallocate(self._file, start, nbytes)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                error.strerror = (
                    f"no room for {nbytes / 1e6:.0f} MB of parameters; free some, or take another folder"
                )
                error.filename = str(self._folder)
            raise
