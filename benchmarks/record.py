"""What every measurement shares: where the data is, what the machine is, where results go."""

import datetime
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax

from jaxopt_llm import cache

_ROOT = Path(__file__).parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
_PACKAGES = ("jaxopt-llm", "jax", "jaxlib", "flax", "numpy", "torch", "transformers", "llama-cpp-python")
_VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")


def data_folder() -> Path:
    """The larger texts: `$JAXOPT_DATA`, else the shared folder's beside the checkout."""
    folder = Path(os.environ.get("JAXOPT_DATA", _ROOT.parent / "shared"))
    return folder / "data" if (folder / "data").is_dir() else folder


def record(name: str, results: Any) -> None:
    """Prints results as JSON and writes them with date, hardware and versions to benchmarks/results/NAME.json."""
    cpu, extensions = cache.cpu()
    entry = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "vectors": [name for name in _VECTORS if name in extensions],
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": sys.version.split()[0],
        "packages": {package: version for package in _PACKAGES if (version := _version(package))},
        # Of a path only the last part: where things lie on a machine is nobody's business.
        "command": " ".join(
            [
                f"python -m benchmarks.{Path(sys.argv[0]).stem}",
                *(re.sub(r"/\S*/", "", a) for a in sys.argv[1:]),
            ]
        ),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


def recorded(name: str) -> Any:
    """Results that `record` wrote under this name; None if there are none."""
    place = RESULTS / f"{name}.json"
    return json.loads(place.read_text("utf-8"))["results"] if place.exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
