"""The shared library of CPU kernels: found, configured and registered on first use."""

import ctypes
import functools
import os
from pathlib import Path

import jax

_FILE = Path(__file__).with_name("libjaxopt_cpu.so")
_HANDLERS = ("jaxopt_linear", "jaxopt_attention", "jaxopt_rms_norm")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, its handlers registered with XLA, or None where there is none.

    `JAXOPT_CPU_ISA` chooses a lower instruction set than the best; `JAXOPT_CPU_THREADS` how many threads work.

    Raises:
      ValueError: if a variable holds what this machine cannot do.
    """
    if not _FILE.is_file():
        return None
    library = ctypes.CDLL(str(_FILE))
    library.jaxopt_isa.restype = library.jaxopt_current_isa.restype = ctypes.c_char_p
    for name in _HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    if isa := os.environ.get("JAXOPT_CPU_ISA"):
        _use_isa(library, isa)
    if threads := os.environ.get("JAXOPT_CPU_THREADS"):
        _use_threads(library, threads)
    return library


def supported() -> list[str]:
    """The instruction sets with kernels that this machine can run, fastest first."""
    return _supported(_require())


def configure(*, isa: str | None = None, threads: int | None = None) -> None:
    """As the environment variables do, at any time: later calls use these.

    Raises:
      ValueError: for what this machine cannot do.
    """
    if isa is not None:
        _use_isa(_require(), isa)
    if threads is not None:
        _use_threads(_require(), str(threads))


def status() -> str:
    """One line: which kernels run and on how many threads, or why there are none."""
    library = load()
    if library is None:
        return f"none, XLA runs everything: {_FILE.name} was not built (a C++ compiler is needed at installation)"
    return f"{library.jaxopt_current_isa().decode()}, threads: {library.jaxopt_threads()}"


def _require() -> ctypes.CDLL:
    library = load()
    if library is None:
        raise RuntimeError(f"{_FILE} is not there: install the package again where there is a C++ compiler")
    return library


def _supported(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while name := library.jaxopt_isa(len(names)):
        names.append(name.decode())
    return names


def _use_isa(library: ctypes.CDLL, name: str) -> None:
    if name not in (names := _supported(library)):
        raise ValueError(f"JAXOPT_CPU_ISA={name!r} is not among what this machine runs: {', '.join(names)}")
    library.jaxopt_use_isa(name.encode())


def _use_threads(library: ctypes.CDLL, count: str) -> None:
    if not count.isdecimal() or not 1 <= int(count) <= 1024:
        raise ValueError(f"JAXOPT_CPU_THREADS={count!r} must be a number of threads from 1 to 1024")
    library.jaxopt_use_threads(int(count))
