"""Finished steps of a run, on disk: an interrupted run goes on after the last of them."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from jaxopt_llm import checkpoints
from jaxopt_llm.calibrate.resume import origin, refuse_another
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.models import Transformer, mesh_of
from jaxopt_llm.optimize.recipe import Recipe
from jaxopt_llm.text import Tokenizer

_RUN = "run.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step left behind.

    Attributes:
      step: its name.
      parameters: numbers that the model then holds.
      bytes: of its parameters in memory, scales included.
      perplexity: on the text.
      kld_mean: mean KL divergence of its predictions from the original's, nats a token.
      same_top_p: share of positions where it ranks the same token first as the original.
      seconds: of the step alone, since it was started or resumed.
    """

    step: str
    parameters: int
    bytes: int
    perplexity: float
    kld_mean: float
    same_top_p: float
    seconds: float


class Finished(NamedTuple):
    """How far a run is.

    Attributes:
      model: after the last finished step.
      steps: what each of them left.
      perplexity: of the original; NaN before the first.
    """

    model: Transformer
    steps: tuple[StepReport, ...] = ()
    perplexity: float = math.nan


class Kept:
    """What one run keeps until its result is saved; a context in which it is worked on.

    Args:
      folder: of the run, made when there is something to keep; None keeps nothing.
      run: what makes the run, as `identity` gives it.

    Raises:
      ValueError: if the run that `folder` holds is another.
    """

    def __init__(self, folder: Path | None, run: dict[str, str | None]):
        self._folder = folder
        if folder is None:
            return
        if (started := folder / _RUN).exists():
            refuse_another(folder, json.loads(started.read_text("utf-8")), run, kind="a run")
        else:
            with atomic_file(started) as file:
                file.write(json.dumps(run, indent=1).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """A run that was stopped before it had anything to keep leaves nothing."""
        if self._folder is not None and [path.name for path in self._folder.glob("*")] == [_RUN]:
            self.remove()

    def last(self, original: Transformer) -> Finished:
        """The run after its last finished step; at its beginning, with the original, if there is none."""
        reports = sorted(self._folder.glob("step-*/report.json")) if self._folder else []
        if not reports:
            return Finished(original)
        steps = [json.loads(path.read_text("utf-8")) for path in reports]
        model, _ = checkpoints.load(reports[-1].parent / "model", mesh=mesh_of(original))
        perplexity = steps[-1]["original"]
        return Finished(model, tuple(StepReport(**step["report"]) for step in steps), perplexity)

    def working(self, number: int) -> Path | None:
        """Where a step, counted from 1, may keep its own unfinished work."""
        return None if self._folder is None else _place(self._folder, number) / "working"

    def keep(self, finished: Finished, tokenizer: Tokenizer) -> None:
        """Keeps the last step: whole or not at all. Its unfinished work goes."""
        if self._folder is None:
            return
        place = _place(self._folder, len(finished.steps))
        checkpoints.save(finished.model, tokenizer, place / "model")
        report = {"original": finished.perplexity, "report": dataclasses.asdict(finished.steps[-1])}
        with atomic_file(place / "report.json") as file:  # last: it says that all is there
            file.write(json.dumps(report, indent=1).encode())
        shutil.rmtree(place / "working", ignore_errors=True)

    def remove(self) -> None:
        """Once the result is saved, nothing that was kept is needed; what others put beside it stays."""
        if self._folder is None:
            return
        for place in self._folder.glob("step-*"):
            shutil.rmtree(place, ignore_errors=True)
        (self._folder / _RUN).unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def identity(
    model: Transformer, recipe: Recipe, ids: Sequence[int], calibration: str | None
) -> dict[str, str | None]:
    """What tells runs apart, by the names that a user knows.

    Args:
      model: the original.
      recipe: steps and how to measure.
      ids: of the text that is measured on.
      calibration: the text that the steps may see.
    """
    seen = None if calibration is None else hashlib.sha256(calibration.encode()).hexdigest()
    return {**origin(model, np.asarray([ids], np.int32)), "recipe": repr(recipe), "calibration text": seen}


def _place(folder: Path, number: int) -> Path:
    return folder / f"step-{number:02d}"
