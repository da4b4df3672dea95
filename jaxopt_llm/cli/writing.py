"""Where commands write: asked before minutes of work, not after them."""

import errno
import os
from pathlib import Path

from jaxopt_llm.checkpoints.atomic import check_replaceable


def out_path(given: str, *, marker: str | None, flag: str = "out") -> Path:
    """The local path that a flag means, if what a command makes can be written there.

    Args:
      given: the flag's value; `~` is the home directory.
      flag: its name.
      marker: what every checkpoint holds of the kind that is to be written; None for a file in place of a directory.

    Raises:
      ValueError: if it is empty or remote.
      OSError: if something stands there that is not replaced, or nothing can be made there.
    """
    if not given:
        raise ValueError(f"--{flag} is empty; name where to write the result")
    if "://" in given:
        raise ValueError(f"--{flag}={given} is remote; name a local path, and copy it there afterwards")
    out = Path(os.path.expanduser(given))
    if marker is not None:
        check_replaceable(out, marker)
    elif out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory stands where a file is to be written", str(out))
    _check_parent(out, flag)
    return out


def existing_parent(out: Path) -> Path:
    """The innermost folder around a path that is there."""
    return next(place for place in Path(os.path.realpath(out)).parents if place.exists())


def _check_parent(out: Path, flag: str) -> None:
    parent = existing_parent(out)
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, so no directory can be made below it", str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, f"cannot be written to; choose another --{flag}", str(parent))
