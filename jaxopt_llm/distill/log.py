"""What a run measured, a step a line: JSON lines, and TensorBoard where tensorboardX is installed."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxopt_llm.checkpoints.atomic import atomic_file

_FILE = "metrics.jsonl"


class Log:
    """Writes a run's measurements.

    Args:
      folder: of the run.
      step: the last step that counts: lines of later ones, which a killed run left, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / _FILE
        kept = [row for row in read(folder) if row["step"] <= step]
        with atomic_file(path) as file:
            file.writelines(_line(row) for row in kept)
        self._file = path.open("ab", buffering=0)
        self._board = _board(folder, step)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step's values, `step` among them."""
        self._file.write(_line(row))
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run; one that a killed process left unfinished is not among them."""
    path = folder / _FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def plot(folder: Path) -> Path | None:
    """Draws the losses of a run over its steps, where matplotlib is installed; the file."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    rows = read(folder)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
    for name in ("loss", "cross_entropy", "divergence", "hidden"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    return folder / "loss.png"


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _board(folder: Path, step: int) -> Any:
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ModuleNotFoundError:
        return None
    return writer(str(folder / "tensorboard"), purge_step=step + 1)
