"""Versions, devices, kernels and caches: what to tell when something goes wrong."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from jaxopt_llm import cache
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import JSON

PACKAGES = ("jaxopt-llm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
# the instruction sets that decide how fast weights stream through a processor
VECTOR_EXTENSIONS = {
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # ARM
}


def main(argv: Sequence[str]) -> None:
    report = environment()
    if JSON.value:
        show.json_line(report)
    else:
        show.fields(report)


def environment() -> dict[str, object]:
    """Everything the command prints, by name."""
    import jax

    from jaxopt_llm.kernels.cpu import library

    model, instructions = cache.cpu()
    folder = cache.cache_folder()
    return {
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpu": model,
        "vector_extensions": [name for name in instructions if name in VECTOR_EXTENSIONS],
        "kernels": f"CPU: {library.status()}" if jax.default_backend() == "cpu" else "XLA",
        "cache": folder,
        "compiled_programs": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        "models_cached": sorted(path.name for path in folder.rglob("*.gguf")),
    }
