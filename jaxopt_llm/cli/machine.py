"""The machine a command runs on: its processor, what JAX reads from the environment.

Imports no JAX: `prepare` has to come first.
"""

import hashlib
import itertools
import os
import platform
from pathlib import Path

from jaxopt_llm.cache import cache_folder


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


def compilation_cache(folder: Path) -> dict[str, str]:
    """Environment variables that have JAX keep compiled programs in `folder`.

    Each kind of processor gets its own subfolder: JAX's key leaves out the processor, and a program compiled
    with AVX-512 ends in an illegal instruction where there is none (a home directory shared by a cluster).
    """
    processor = hashlib.sha256(repr(cpu()).encode()).hexdigest()[:12]
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder / processor),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # the many small ones add up to seconds
    }


def prepare() -> None:
    """Sets what JAX and XLA read when they are imported; what the user has set stays."""
    # 3: XLA logs an error about harmless tuning flags for each cached program; real errors are exceptions
    defaults = {"TF_CPP_MIN_LOG_LEVEL": "3", **compilation_cache(cache_folder() / "xla")}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
