"""`Recipe`: the steps that make a model smaller, and how the result is measured."""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxopt_llm.evaluate import check_lengths, check_sizes
from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Calibration, Context
from jaxopt_llm.quantize import check_rules, quantize


@runtime_checkable
class Step(Protocol):
    """One change to a whole model: a frozen dataclass of its settings."""

    def __call__(self, model: Transformer, context: Context) -> Transformer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Rounds matrices to nearest: see `jaxopt_llm.quantize`.

    Attributes:
      format: of every matrix that no rule names; None leaves those floats.
      rules: pairs of a regular expression and a format; the first that is found in a matrix's name decides.
    """

    format: str | None = "int8"
    rules: tuple[tuple[str, str | None], ...] = ()

    def __post_init__(self):
        check_rules([*self.rules, (".*", self.format)])

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        return quantize(model, self.format, rules=self.rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """How a model is measured before and after.

    Attributes:
      window: tokens of text read at once.
      windows: how many of them, without overlap.
      prompt_tokens, output_tokens: of the timed generation.
      question: whose answer is shown.
      answer_tokens: longest answer.
    """

    window: int = 512
    windows: int = 4
    prompt_tokens: int = 96
    output_tokens: int = 32
    question: str = "Why is the sky blue?"
    answer_tokens: int = 64

    def __post_init__(self):
        self.check()
        if not self.question:
            raise ValueError("question is empty; give at least one character")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens={self.answer_tokens} must be at least 1")

    def check(self, context: int | None = None) -> None:
        """Raises ValueError for sizes that measure nothing, or beyond a model's context."""
        check_sizes(window=self.window, windows=self.windows, context=context)
        check_lengths(prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens, context=context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `optimize` does.

    Attributes:
      steps: one after another.
      measure: before the first and after the last.
      calibration: what the steps that need a text see.
    """

    steps: tuple[Step, ...]
    measure: Measure = Measure()
    calibration: Calibration = Calibration()

    def __post_init__(self):
        if not self.steps:
            raise ValueError("a recipe needs at least one step, such as Quantize()")
