"""Devices that are not there: what the compiler needs to know of a TPU or a GPU, and nothing that could run."""

import contextlib
import importlib.util
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies

from jaxopt_llm.sharding.chips import CHIPS

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


def gpu(name: str, count: int = 1) -> list[jax.Device]:
    """The NVIDIA GPUs of a host, to compile for. `JAX_PLATFORMS=cpu` keeps JAX from looking for real ones.

    Args:
      name: a GPU of `chips.CHIPS` that the plugin describes: with jax 0.12 `a100-80`, `h100` or `b200`.
      count: GPUs of the host.

    Raises:
      ModuleNotFoundError: if JAX's CUDA plugin is not installed.
      ValueError: for a GPU that the plugin does not describe.
    """
    library = _cuda_plugin()
    if library is None:
        raise ModuleNotFoundError(
            "compiling for a GPU needs its compiler: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, "
            "in jax's own version"
        )
    kinds = CHIPS[name].kinds if name in CHIPS else ()
    config = next(filter(None, (_target(library, kind) for kind in kinds)), None)
    if config is None:
        raise ValueError(f"{library.name} of this version describes no GPU {name}; try h100 and jax 0.12")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x1x{count}", target_config=config
    )
    return list(found.devices)


def _cuda_plugin() -> Path | None:
    for plugin in ("xla_cuda12", "xla_cuda13"):
        with contextlib.suppress(ModuleNotFoundError):  # of `jax_plugins` itself
            if (spec := importlib.util.find_spec(f"jax_plugins.{plugin}")) and spec.origin:
                return Path(spec.origin).with_name("xla_cuda_plugin.so")
    return None


def _target(library: Path, kind: str) -> str | None:
    """What the plugin says of a GPU: XLA's GpuTargetConfigProto, which lies in the library as text."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        last = data.find(f'device_description_str: "{kind}"'.encode())
        return data[data.rfind(b"\0", 0, last) + 1 : data.find(b"\0", last)].decode() if last >= 0 else None


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
