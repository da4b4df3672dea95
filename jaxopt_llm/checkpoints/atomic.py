"""Files and directories that are written whole or not at all."""

import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# What says that a directory is a checkpoint: a file, and a key in it, for other programs write a config.json too.
_MARKERS = {"config.json": "model_type", "jaxopt_llm.json": "version", "adapter_config.json": "peft_type"}
# All that we and transformers' `save_pretrained` write into one.
_WRITTEN = re.compile(
    r"(config|generation_config|jaxopt_llm|model\.safetensors\.index)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(preprocessor|processor|video_preprocessor)_config\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja|additional_chat_templates(/[^/]+\.jinja)?"
    r"|adapter_config\.json|adapter_model\.safetensors"  # PEFT
    r"|params(/.*)?"  # Orbax
)
_ATTEMPTS = 20  # to remove a directory
_YOUNG = 1.0  # seconds; a temporary this new may not be locked yet by the process that makes it


@contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in place of `target`, which appears whole when the block ends, or not at all.

    Killed at any moment, or out of disk space, `target` is what it was. What a killed process left beside it
    goes at the next write.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory stands where a file is to be written", str(target))
    temporary = _temporary(target)
    try:
        with _told_of(target, temporary), open(temporary, "xb") as file, _locked(temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise
    _sync(target.parent)


@contextmanager
def atomic_directory(target: str | os.PathLike[str], *, marker: str) -> Iterator[Path]:
    """A directory to fill in place of `target`, which appears whole when the block ends, or not at all.

    Like `atomic_file`. Where the file system cannot exchange two directories in one step (NFS, some network
    drives), the old one waits as `.NAME.replaced` for the moment between two renames; after a kill just then,
    the next write puts it back.

    Args:
      target: replaced, with all that is in it, if `check_replaceable` allows.
      marker: the file that every checkpoint of this kind holds: config.json, jaxopt_llm.json.

    Raises:
      FileExistsError: if something else stands there.
    """
    target = Path(os.path.realpath(target))
    temporary, old = _temporary(target), target.with_name(f".{target.name}.replaced")
    if old.exists():
        _remove(old) if target.exists() else old.rename(target)
    check_replaceable(target, marker)
    try:
        with _told_of(target, temporary):
            temporary.mkdir()
            with _locked(temporary):
                yield temporary
                for path in [*temporary.rglob("*"), temporary]:
                    _sync(path)
                _swap(temporary, target, old)
    finally:
        _remove(temporary)  # what it replaced, by now, or what an error left unfinished
    _sync(target.parent)


def check_replaceable(target: Path, marker: str) -> None:
    """Raises FileExistsError if something else stands at `target` than an empty directory or a checkpoint.

    A checkpoint's `marker` says that it is one, and all beside it is what we or transformers write.
    """
    doubt = _doubt(target, marker) if target.exists() else None
    if doubt:
        reason = f"not replaced, since it is no checkpoint ({doubt}); choose another"
        raise FileExistsError(errno.EEXIST, reason, str(target))


def _doubt(target: Path, marker: str) -> str | None:
    """Why `target` may be something else than an empty directory or a checkpoint."""
    if not target.is_dir():
        return "a file"
    if not any(target.iterdir()):
        return None
    if not (target / marker).is_file():
        return f"no {marker} in it"
    try:
        said = json.loads((target / marker).read_bytes())
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or _MARKERS[marker] not in said:
        return f"no {_MARKERS[marker]} in its {marker}"
    names = (path.relative_to(target).as_posix() for path in target.rglob("*"))
    stranger = next((name for name in names if not _WRITTEN.fullmatch(name)), None)
    return stranger and f"{stranger} in it"


@contextmanager
def _told_of(target: Path, temporary: Path) -> Iterator[None]:
    """Errors name the target where they would name what is written in its place."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            error.filename = os.fsdecode(error.filename).replace(str(temporary), str(target))
        raise


def _swap(new: Path, target: Path, old: Path) -> None:
    """Puts `new` at `target`; what stood there ends up at `new`, or is gone."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        target.rename(old)
        new.rename(target)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step; false where the system (not Linux) or the file system cannot."""
    at_cwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and not renameat2(
        at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange
    )


def _temporary(target: Path) -> Path:
    """A new hidden name beside `target`. What dead processes left there is removed: nobody holds its lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(FileNotFoundError):  # another process removes it too
            if time.time() - leftover.stat().st_mtime > _YOUNG:
                with _locked(leftover) as held:
                    if held:
                        _remove(leftover)
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock of `path` could be had: another process may hold it, or there are no locks here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    for _ in range(_ATTEMPTS):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # a thread of Orbax still writes into it
            time.sleep(0.1)
