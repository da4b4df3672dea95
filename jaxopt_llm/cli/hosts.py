"""Commands in several processes: they meet before JAX touches a device, and process 0 alone reads stdin and prints."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxopt_llm.checkpoints import AUTO
from jaxopt_llm.sharding import MeshSpec, hosts


@contextlib.contextmanager
def together(given: Mapping[str, Any], mesh: str | None) -> Iterator[bool]:
    """What a command does in each of its processes; gives whether this one only follows process 0.

    Args:
      given: the flags of HOSTS that were given; without any this is the one process.
      mesh: the flag, which has to name devices of all of them.

    Raises:
      ValueError: as `hosts.connect`, and for a mesh that leaves devices out.
    """
    if "coordinator" not in given:
        if given:
            raise ValueError(
                f"--{next(iter(given))} goes with --coordinator, the address of process 0, or auto"
            )
        yield False
        return
    if mesh is None:
        raise ValueError(
            "--coordinator spreads a model over all processes; say how with --mesh, or --mesh=auto"
        )
    names = {"join_s": "timeout_s"}
    link = hosts.connect(**{names.get(name, name): value for name, value in given.items()})
    with link or contextlib.nullcontext(), _one_voice(0 if link is None else link.index):
        _check_mesh(mesh)
        yield link is not None and link.index > 0


def _check_mesh(mesh: str) -> None:
    devices = len(jax.devices())
    if mesh != AUTO and MeshSpec.parse(mesh).size != devices:
        raise ValueError(
            f"--mesh={mesh} has {MeshSpec.parse(mesh).size} devices and all processes together {devices}; "
            "take as many"
        )


@contextlib.contextmanager
def _one_voice(process: int) -> Iterator[None]:
    """Printing goes to stdout from process 0 alone; what libraries print there themselves goes to stderr."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file: a test's, or a notebook's
        yield
        return
    sys.stdout.flush()
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        with (
            open(os.devnull if process else kept, "w", buffering=1, closefd=process > 0) as own,
            contextlib.redirect_stdout(own),
        ):
            yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
