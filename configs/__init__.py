"""Runnable scenarios: Python files whose `config()` returns one frozen dataclass.

A config lists only what differs from the defaults; its docstring holds the command, the time it takes and the
figure to expect, all three from a real run.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxopt_llm.configs.overrides import is_frozen, nearest, override

__all__ = ["load", "names", "override"]

FOLDER = Path(__file__).parent


def names(kind: str = "*") -> list[str]:
    """Names of the packaged configs in the folder `kind`, such as `recipes`, or in all."""
    return sorted(_packaged(kind))


def load(source: str, overrides: Sequence[str] = ()) -> Any:
    """The config of a packaged name or of one's own `path.py`, with overrides `a.b=value` applied in order.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if there is no such name, if the file fails or gives no frozen dataclass, if an override
        names an unknown field or a value of another type.
    """
    config = _run(_find(source))
    if not is_frozen(config):
        kind = type(config).__name__
        raise ValueError(f"config() of {source} must return a frozen dataclass, not {kind}")
    for assignment in overrides:
        config = override(config, assignment)
    return config


def _packaged(kind: str = "*") -> dict[str, Path]:
    files = FOLDER.glob(f"{kind}/*.py")
    return {path.stem: path for path in files if re.search(r"^def config\(", path.read_text("utf-8"), re.M)}


def _find(source: str) -> Path:
    if source.endswith(".py"):
        return Path(source).expanduser()
    known = _packaged()
    if source not in known:
        raise ValueError(f"no config {source!r}{nearest(source, known)}; known: {', '.join(sorted(known))}")
    return known[source]


def _run(path: Path) -> Any:
    """What `config()` of a file returns."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such config file", str(path))
    spec = importlib.util.spec_from_file_location(f"jaxopt_llm_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the type hints of dataclasses defined in the file are looked up
    try:
        spec.loader.exec_module(module)
        function = getattr(module, "config", None)
        if function is None:
            raise ValueError("defines no config()")
        return function()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{error}") from error
