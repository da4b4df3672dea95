"""Writes that are whole or absent."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest

from jaxopt_llm.checkpoints import atomic
from jaxopt_llm.checkpoints.atomic import atomic_directory, atomic_file
from tests.forks import forks, in_child

MARKER = "jaxopt_llm.json"


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
    with atomic_directory(target, marker=MARKER) as folder:
        (folder / MARKER).write_text(said(text))
        (folder / "params").mkdir()
        (folder / "params" / text).touch()


def said(text: str) -> str:
    return json.dumps({"version": text})


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_atomic_directory(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "parent" / "out"
    for text in ("one", "two", "three"):
        fill(target, text)
        assert (target / MARKER).read_text() == said(text)
        assert listing(target / "params") == [text]
    with pytest.raises(RuntimeError), atomic_directory(target, marker=MARKER) as folder:
        fail_after((folder / MARKER).write_text(said("four")))
    assert (target / MARKER).read_text() == said("three")
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


HF = {
    "config.json": '{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": "",
    "tokenizer.json": "{}",
}
OURS = {MARKER: '{"version": 1}', "params/d/0": "", "tokenizer_config.json": "{}"}


def lay(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("marker", "files"),
    [
        ("config.json", {}),
        ("config.json", HF),
        ("config.json", HF | {"additional_chat_templates/tool_use.jinja": "", "chat_template.jinja": ""}),
        (MARKER, OURS),
    ],
)
def test_a_checkpoint_is_replaced(tmp_path, marker, files):
    (tmp_path / "out").mkdir()
    lay(tmp_path / "out", files)
    with atomic_directory(tmp_path / "out", marker=marker) as folder:
        (folder / "new").touch()
    assert listing(tmp_path / "out") == ["new"]


@pytest.mark.parametrize(
    ("marker", "files", "reason"),
    [
        ("config.json", {"thesis.tex": ""}, "no config.json in it"),
        ("config.json", OURS, "no config.json in it"),
        ("config.json", {"config.json": '{"port": 80}'}, "no model_type in its config.json"),
        ("config.json", {"config.json": "[" * 9999}, "no model_type in its config.json"),
        (MARKER, HF, f"no {MARKER} in it"),
        (MARKER, {MARKER: '["version"]'}, f"no version in its {MARKER}"),
        *(
            (marker, files | {name: ""}, f"{name} in it")
            for marker, files in (("config.json", HF), (MARKER, OURS))
            for name in ("main.py", ".git", "model-7.safetensors", "checkpoint-5", "old.model.safetensors")
        ),
        ("config.json", HF | {"src/config.json": ""}, "src in it"),
        (
            "config.json",
            HF | {"additional_chat_templates/main.py": ""},
            "additional_chat_templates/main.py in it",
        ),
    ],
)
def test_nothing_else_is(tmp_path, marker, files, reason):
    before = lay(tmp_path / "home", files)
    with pytest.raises(FileExistsError, match=rf"no checkpoint \({re.escape(reason)}\).*home"):
        fill_with(tmp_path / "home", marker)
    with pytest.raises(FileExistsError, match=r"no checkpoint \(a file\)"):
        fill_with(tmp_path / "home" / next(iter(files)), marker)
    assert lay(tmp_path / "home", {}) == before


def fill_with(target: Path, marker: str) -> None:
    with atomic_directory(target, marker=marker):
        pass


def test_errors_name_the_target(tmp_path):
    with (
        pytest.raises(FileNotFoundError) as caught,
        atomic_directory(tmp_path / "out", marker=MARKER) as folder,
    ):
        (folder / "absent").read_bytes()
    assert caught.value.filename == str(tmp_path / "out" / "absent")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a directory in which nobody can make anything")
def test_errors_name_the_target_that_cannot_be_made():
    for writer in (atomic_file("/proc/out"), atomic_directory("/proc/out", marker=MARKER)):
        with pytest.raises(OSError) as caught, writer:
            pass
        assert caught.value.filename == "/proc/out"


def test_a_link_to_a_directory_stays_one(tmp_path):
    fill(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / MARKER).read_text() == said("two")


def test_full_disk_leaves_the_old_target(tmp_path):
    fill(tmp_path / "out", "old")
    with (
        pytest.raises(OSError, match="No space"),
        atomic_directory(tmp_path / "out", marker=MARKER) as folder,
    ):
        fail_after(
            (folder / MARKER).write_text(said("new")), OSError(errno.ENOSPC, "No space left on device")
        )
    assert (tmp_path / "out" / MARKER).read_text() == said("old")
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
        with atomic_directory(target, marker=MARKER) as folder:
            (folder / MARKER).write_text(said("new"))
            if moment == "while writing":
                die()

    assert in_child(write) == -signal.SIGKILL
    if left:
        assert (target / MARKER).read_text() == said(left)
    else:
        assert (tmp_path / ".out.replaced" / MARKER).read_text() == said("old")
    for leftover in tmp_path.glob(".out.*.tmp"):
        os.utime(leftover, (0, 0))
    with pytest.raises(RuntimeError), atomic_directory(target, marker=MARKER):
        fail_after(None)
    assert listing(tmp_path) == ["out"]
    assert (target / MARKER).read_text() == said(left or "old")


def test_another_writers_temporary_is_left_alone(tmp_path):
    with atomic_file(tmp_path / "f") as slow:
        os.utime(slow.name, (0, 0))
        with atomic_file(tmp_path / "f") as fast:
            fast.write(b"fast")
        slow.write(b"slow")
    assert (tmp_path / "f").read_bytes() == b"slow"
    assert listing(tmp_path) == ["f"]
