"""The steps of a recipe, one after another, each measured and kept before the next begins."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxopt_llm import evaluate
from jaxopt_llm.calibrate import calibration_ids
from jaxopt_llm.models import Transformer, num_bytes, num_params, weights
from jaxopt_llm.optimize.context import Context
from jaxopt_llm.optimize.kept import Finished, Kept, StepReport
from jaxopt_llm.optimize.recipe import Recipe, Step
from jaxopt_llm.text import Tokenizer

Progress = Callable[[str, int, int], None]


class Steps:
    """One run of a recipe's steps.

    Args:
      original: the model before the first, which stays as it is.
      tokenizer: of all texts.
      recipe: the steps, and how much text they are calibrated and measured on.
      text: to measure on.
      calibration: text that the steps may see; None: the original is sampled for one.
      progress: called with (stage, parts of it done, of all).
    """

    def __init__(
        self,
        original: Transformer,
        tokenizer: Tokenizer,
        recipe: Recipe,
        *,
        text: str,
        calibration: str | None,
        progress: Progress,
    ):
        self._original, self._tokenizer, self._recipe = original, tokenizer, recipe
        self._reference = evaluate.Reference(original)
        self._text, self._calibration, self._progress = text, calibration, progress
        size = recipe.calibration
        sample = functools.partial(
            calibration_ids, original, tokenizer, calibration, sequences=size.sequences, length=size.length
        )
        self._ids = functools.cache(sample)

    def run(self, kept: Kept) -> Finished:
        """Those that are not finished yet; what all of them left."""
        finished, total = kept.last(self._original), len(self._recipe.steps)
        for number, step in enumerate(self._recipe.steps[len(finished.steps) :], len(finished.steps) + 1):
            self._progress("compressing", number - 1, total)
            finished = self._after(step, finished, kept.working(number))
            kept.keep(finished, self._tokenizer)
        self._progress("compressing", total, total)
        return finished

    def _after(self, step: Step, before: Finished, folder: Path | None) -> Finished:
        name = type(step).__name__.lower()
        context = Context(
            original=self._original,
            tokenizer=self._tokenizer,
            ids=self._ids,
            calibration=self._calibration,
            held_out=self._text,
            progress=functools.partial(self._progress, name),
            stages=self._progress,
            folder=folder,
        )
        begun = time.perf_counter()
        model = step(before.model, context)
        jax.block_until_ready(weights(model))
        seconds = time.perf_counter() - begun
        quality = self._quality(model)
        report = StepReport(
            step=name,
            parameters=num_params(model),
            bytes=num_bytes(model),
            perplexity=quality.perplexity.perplexity,
            kld_mean=quality.kld_mean,
            same_top_p=quality.same_top_p,
            seconds=seconds,
        )
        return Finished(model, (*before.steps, report), quality.reference.perplexity)

    def _quality(self, model: Transformer) -> evaluate.Comparison:
        measure = self._recipe.measure
        return evaluate.compare(
            model,
            self._reference,
            self._tokenizer.encode(self._text, add_special=False),
            window=measure.window,
            windows=measure.windows,
            progress=functools.partial(self._progress, "comparing on text"),
        )
