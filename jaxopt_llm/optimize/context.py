"""What a step may use beside the model it changes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int


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
    """Of one run of a recipe.

    Attributes:
      ids: gives the calibration text, N sequences of T tokens; a model is sampled for it when it is first asked for.
      progress: to be called with (parts of the step done, of all).
      folder: where the step may keep what it has finished, for it to go on after an interruption; None keeps nothing.
    """

    ids: Callable[[], Int[np.ndarray, "N T"]]
    progress: Callable[[int, int], None]
    folder: Path | None = None
