"""Devices that are not there: what the compiler needs to know of a TPU, and nothing that could run."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies

# libtpu reads these while it starts. It asks a metadata server of its machine, takes a lock file for itself and writes
# logs unless told not to; the type and the name of the machine keep it from complaining that it found none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def tpu(version: str, layout: str = "2x2") -> list[jax.Device]:
    """The devices of a TPU slice, to compile for: in `SingleDeviceSharding`, or in `MeshSpec.build`.

    Args:
      version: `v4`, `v5e`, `v5p`, `v6e` or `tpu7x`.
      layout: chips along each axis, in multiples of a host's 2x2; three axes for v4, v5p and tpu7x.

    Raises:
      ModuleNotFoundError: if libtpu is not installed.
      ValueError: for a slice that does not exist.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for a TPU needs its compiler, libtpu: pip install 'jaxopt-llm[tpu-aot]'"
        )
    with _environment(_ENVIRONMENT):
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{version}:{layout}")
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"there is no TPU slice {version}:{layout}: {reason}") from error
    return list(found.devices)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables within, and what was there before after it; what the user has set stays."""
    missing = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
