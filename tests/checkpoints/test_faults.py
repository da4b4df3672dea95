"""A save that is killed, or that runs out of disk space, leaves what was there before.

One process forks a child for each fault, where JAX starts anew; the tests then look at what is on the disk.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.cli import main
from jaxopt_llm.models import weights
from jaxopt_llm.models.families import parse_config
from tests import families

ROOT = Path(__file__).parents[2]
CONFIG = families.LLAMA | {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
SAVE = {"hf": checkpoints.export_hf, "orbax": jo.save, "gguf": checkpoints.export_gguf}
MOMENTS = (0.0, 0.6, 0.95, 1.0)  # of the calls to the file system that a save makes
LIMIT = 100_000  # bytes a file, where the embedding has 262,144


def target(folder: Path, kind: str, fault: object) -> Path:
    return folder / f"{kind} {fault}" / ("model.gguf" if kind == "gguf" else "model")


def model(seed: int) -> jo.Transformer:
    """Seed 0 is the old model, 1 the new."""
    return jo.Transformer(parse_config(CONFIG), rngs=nnx.Rngs(seed))


def run_faults(folder: Path) -> None:
    for kind, save in SAVE.items():  # hf first: the commands read what it leaves
        in_child(lambda kind=kind, save=save: prepare(folder, kind, save))
        total = int((folder / kind).read_text())
        for moment in MOMENTS:
            path, at = target(folder, kind, moment), max(1, round(moment * total))
            code = in_child(lambda save=save, path=path, at=at: killed_save(save, path, at))
            assert code == -signal.SIGKILL or moment > 0.9, (kind, moment, code)
        in_child(lambda kind=kind: full_disk(folder, kind))


def prepare(folder: Path, kind: str, save: Callable[..., None]) -> None:
    """The old model at every target, and in a file how many calls a save makes."""
    first, *others = [target(folder, kind, fault) for fault in (*MOMENTS, "disk full")]
    save(model(0), None, first)
    for path in others:
        path.parent.mkdir()
        (shutil.copytree if first.is_dir() else shutil.copyfile)(first, path)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    with on_each_call(count):
        save(model(1), None, target(folder, kind, "rehearsal"))
    (folder / kind).write_text(str(calls))


def killed_save(save: Callable[..., None], path: Path, at: int) -> None:
    new, left = model(1), at

    def count() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with on_each_call(count):
        save(new, None, path)


@contextlib.contextmanager
def on_each_call(function: Callable[[], None]):
    """Calls a function whenever Python, in any thread, is about to touch a file."""
    active = True

    def hook(event: str, _: object) -> None:
        if active and event.partition(".")[0] in ("open", "os", "shutil", "ctypes") and event != "os.kill":
            function()

    sys.addaudithook(hook)
    yield
    active = False


def full_disk(folder: Path, kind: str) -> None:
    source, path = target(folder, "hf", MOMENTS[-1]), target(folder, kind, "disk full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    report = {}
    with open(path.parent / "stderr", "w") as stderr:
        os.dup2(stderr.fileno(), 2)
        report["code"] = main.run(["convert", f"--model={source}", f"--format={kind}", f"--out={path}"])
    (path.parent / "report").write_text(json.dumps(report))


def in_child(function: Callable[[], None]) -> int:
    """Runs a function in a forked process; its exit code, or the signal it died of, negative."""
    pid = os.fork()
    if not pid:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.test_faults"]
    done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def age(path: Path) -> str:
    """Which model stands there, whole."""
    values = weights(jo.load(path)[0])
    for name, expected in (("old", model(0)), ("new", model(1))):
        pairs = [(values[key], value) for key, value in weights(expected).items()]
        if all(np.allclose(value, other, atol=1e-4) for value, other in pairs):  # GGUF: float16
            return name
    raise AssertionError(f"{path} is neither")


@pytest.mark.parametrize("kind", SAVE)
def test_kill_at_any_moment_leaves_the_old_model_or_the_new(folder, kind):
    paths = [target(folder, kind, moment) for moment in MOMENTS]
    ages = [age(path) for path in paths]
    assert ages[:2] == ["old", "old"]
    assert ages == sorted(ages, reverse=True)
    path = next(path for path in paths if len(list(path.parent.iterdir())) > 1)  # killed while it wrote
    for entry in path.parent.iterdir():
        os.utime(entry, (0, 0))
    SAVE[kind](model(1), None, path)  # takes away what the killed one left
    assert list(path.parent.iterdir()) == [path]
    assert age(path) == "new"


@pytest.mark.parametrize("kind", SAVE)
def test_a_full_disk_leaves_the_old_model(folder, kind):
    path = target(folder, kind, "disk full")
    assert json.loads((path.parent / "report").read_text()) == {"code": 2}
    progress, error = (path.parent / "stderr").read_text().splitlines()
    assert progress.startswith("loading")
    assert error.startswith("jaxopt-llm: error: ")
    assert "File too large" in error
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, "report", "stderr"]
    assert age(path) == "old"


if __name__ == "__main__":
    run_faults(Path(sys.argv[1]))
