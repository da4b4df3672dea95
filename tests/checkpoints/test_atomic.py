"""Writes that are whole or absent."""

import errno
import os
import signal
from pathlib import Path

import pytest

from jaxopt_llm.checkpoints import atomic
from jaxopt_llm.checkpoints.atomic import atomic_directory, atomic_file
from tests.forks import forks, in_child


def fail_after(_: object, error: Exception | None = None) -> None:
    raise error or RuntimeError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_file(tmp_path):
    target = tmp_path / "new" / "file"
    for text in (b"one", b"two"):
        with atomic_file(target) as out:
            out.write(text)
            assert not target.exists() or target.read_bytes() == b"one"
        assert target.read_bytes() == text
    with pytest.raises(RuntimeError), atomic_file(target) as out:
        fail_after(out.write(b"three"))
    assert target.read_bytes() == b"two"
    assert listing(target.parent) == ["file"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path):
        pass


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fill(target: Path, text: str) -> None:
    with atomic_directory(target) as folder:
        (folder / "config.json").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / text).touch()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_atomic_directory(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "parent" / "out"
    for text in ("one", "two", "three"):
        fill(target, text)
        assert (target / "config.json").read_text() == text
        assert listing(target / "sub") == [text]
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        fail_after((folder / "config.json").write_text("four"))
    assert (target / "config.json").read_text() == "three"
    assert listing(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask()


def test_exchange_works_here(tmp_path):
    """Else the tests above would not show it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert listing(tmp_path / "b") == ["x"]
    assert not atomic._exchange(tmp_path / "a", tmp_path / "absent")


def test_atomic_directory_replaces_only_checkpoints(tmp_path):
    fill(tmp_path / "empty", "one")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"no checkpoint \(no config.json in it\).*home"):
        fill(home, "one")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        fill(home / "thesis.tex", "one")
    assert listing(home) == ["thesis.tex"]
    with atomic_directory(home, marker="thesis.tex"):
        pass


def test_a_link_to_a_directory_stays_one(tmp_path):
    fill(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "two"


def test_full_disk_leaves_the_old_target(tmp_path):
    fill(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No space"), atomic_directory(tmp_path / "out") as folder:
        fail_after(
            (folder / "config.json").write_text("new"), OSError(errno.ENOSPC, "No space left on device")
        )
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert listing(tmp_path) == ["out"]


@forks
@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("while writing", "old"),
        ("before the swap", "old"),
        ("between renames", None),  # only where the file system cannot exchange; the next write puts it back
        ("after the swap", "new"),
    ],
)
def test_kill_leaves_the_old_or_the_new(tmp_path, moment, left):
    target = tmp_path / "out"
    fill(target, "old")

    def write() -> None:
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before the swap":
            atomic._swap = die
        elif moment == "after the swap":
            atomic._remove = die
        elif moment == "between renames":
            atomic._exchange = lambda one, other: False
            rename = Path.rename
            Path.rename = lambda self, to: rename(self, to) if to.name.endswith(".replaced") else die()
        with atomic_directory(target) as folder:
            (folder / "config.json").write_text("new")
            if moment == "while writing":
                die()

    assert in_child(write) == -signal.SIGKILL
    if left:
        assert (target / "config.json").read_text() == left
    else:
        assert (tmp_path / ".out.replaced" / "config.json").read_text() == "old"
    for leftover in tmp_path.glob(".out.*.tmp"):
        os.utime(leftover, (0, 0))
    with pytest.raises(RuntimeError), atomic_directory(target):
        fail_after(None)
    assert listing(tmp_path) == ["out"]
    assert (target / "config.json").read_text() == (left or "old")


def test_another_writers_temporary_is_left_alone(tmp_path):
    with atomic_file(tmp_path / "f") as slow:
        os.utime(slow.name, (0, 0))
        with atomic_file(tmp_path / "f") as fast:
            fast.write(b"fast")
        slow.write(b"slow")
    assert (tmp_path / "f").read_bytes() == b"slow"
    assert listing(tmp_path) == ["f"]
