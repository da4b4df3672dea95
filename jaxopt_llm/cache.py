"""Where downloaded models and compiled programs are kept. Imports no JAX: `prepare` has to come before it."""

import hashlib
import itertools
import os
import platform
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxopt_llm`, else `~/.cache/jaxopt_llm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxopt_llm"


def cpu() -> tuple[str, tuple[str, ...]]:
    """Model name and instruction-set flags of the first processor, empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1) for line in itertools.takewhile(str.strip, file)]
    except OSError:
        return platform.processor(), ()
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = fields.get("flags") or fields.get("Features", "")  # x86, ARM
    return fields.get("model name") or platform.machine(), tuple(flags.split())


def program_folder(parent: Path) -> Path | None:
    """A folder for compiled programs in `parent`, now there; None where nothing can be written.

    Each kind of processor gets its own: JAX's key leaves out the processor, and a program compiled with AVX-512 ends in
    an illegal instruction where there is none (a home directory shared by a cluster).
    """
    folder = parent / hashlib.sha256(repr(cpu()).encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def prepare(programs: Path | None = None) -> None:
    """Sets what JAX and XLA read when they are imported; what the user has set stays.

    Args:
      programs: parent of the folder for compiled programs; None for the one that downloads have too.
    """
    # 3: XLA logs an error about harmless tuning flags for each cached program; real errors are exceptions
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if folder := program_folder(programs or cache_folder() / "xla"):
        defaults["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        defaults["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # the many small ones add up to seconds
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def keep_programs() -> None:
    """Has JAX keep compiled programs on disk, unless the user has said where, or that it should not.

    To say so are JAX's own settings: `jax_compilation_cache_dir` and `jax_enable_compilation_cache`.
    """
    import jax

    settings = jax.config.values
    wanted = settings["jax_enable_compilation_cache"] and settings["jax_compilation_cache_dir"] is None
    if wanted and (folder := program_folder(cache_folder() / "xla")):
        jax.config.update("jax_compilation_cache_dir", str(folder))
