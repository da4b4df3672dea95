"""Programs in two processes of four forced devices each, on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

COUNT = 2
ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "PYTHONUNBUFFERED": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
}


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def started(*commands: Sequence[object], **env: str) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each command of arguments to Python; none outlives the context."""
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=ENV | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], *, timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; Gloo may have said of its connections on stdout."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def pair(program: Path | str, *arguments: object) -> list[list[object]]:
    """The commands of both processes: the program gets its address, its number, and the arguments."""
    start = [program] if isinstance(program, Path) else ["-c", program]
    address = free_address()
    return [[*start, address, index, *arguments] for index in range(COUNT)]


def line(error: str) -> str:
    """The last line of stderr, which must be ours."""
    last = error.rstrip("\n").splitlines()[-1]
    assert last.startswith("jaxopt-llm: error: "), error
    assert "Traceback" not in error
    return last.removeprefix("jaxopt-llm: error: ")
