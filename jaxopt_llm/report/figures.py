"""Pictures as files."""

import importlib.util
from pathlib import Path
from typing import Any

_FORMS = (".svg", ".png")


def check_plot(flag: str, path: Path) -> None:
    """Raises ValueError if nothing can be drawn there: to be asked before the work."""
    if path.suffix not in _FORMS:
        raise ValueError(f"--{flag}={path} must end in {' or '.join(_FORMS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib; pip install 'jaxopt-llm[eval]'")


def save(figure: Any, path: Path) -> None:
    """Writes a figure, the same bytes each time."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
