"""What a step may use beside the model it changes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much text the steps that need some see.

    Attributes:
      sequences, length: so many of so many tokens.
    """

    sequences: int = 16
    length: int = 512

    def __post_init__(self):
        if self.sequences < 1 or self.length < 3:
            raise ValueError(
                f"sequences={self.sequences} must be at least 1, and length={self.length} at least 3"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Of one step in a run of a recipe.

    Attributes:
      original: the model before the first step.
      tokenizer: of it and of all that the steps make of it.
      ids: gives the calibration text, N sequences of T tokens; a model is sampled for it when it is first asked for.
      calibration: the whole text that `ids` has pieces of; None where a model is sampled.
      held_out: the text that the run is measured on: to measure on, not to learn from.
      progress: to be called with (parts of the step done, of all).
      stages: the same for a step of several stages, with the name of the stage before.
      folder: where the step may keep what it has finished, for it to go on after an interruption; None keeps nothing.
    """

    original: Transformer
    tokenizer: Tokenizer
    ids: Callable[[], Int[np.ndarray, "N T"]]
    calibration: str | None
    held_out: str
    progress: Callable[[int, int], None]
    stages: Callable[[str, int, int], None]
    folder: Path | None = None
