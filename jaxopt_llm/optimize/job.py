"""The main job: run a recipe, measure the model before and after, save it."""

import dataclasses
import functools
import importlib.resources
from collections.abc import Callable
from pathlib import Path

from jaxopt_llm import checkpoints, evaluate
from jaxopt_llm.engine import Prompt, generate
from jaxopt_llm.evaluate import Speed
from jaxopt_llm.models import Transformer, num_bytes, num_params, num_zeros
from jaxopt_llm.optimize.kept import Kept, StepReport, identity
from jaxopt_llm.optimize.recipe import Measure, Recipe
from jaxopt_llm.optimize.steps import Progress, Steps
from jaxopt_llm.text import Tokenizer

Part = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a model is and does.

    Attributes:
      parameters: numbers that it holds.
      file_bytes: of its file, or of the files in its directory; None where there is none.
      bytes: of its parameters in memory, scales included.
      zeros: share of the parameters that are zeros, stored and multiplied like any other.
      perplexity: on the text.
      kld_mean: mean KL divergence of its predictions from the original's, nats a token.
      same_top_p: share of positions where it ranks the same token first as the original.
      prefill_tokens_per_s, decode_tokens_per_s: of one sequence alone.
    """

    parameters: int
    file_bytes: int | None
    bytes: int
    zeros: float
    perplexity: float
    kld_mean: float
    same_top_p: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a recipe.

    Attributes:
      model: the optimised one.
      before, after: what the original and it are.
      steps: what each step left.
      sample: its answer to the recipe's question.
    """

    model: Transformer
    before: Report
    after: Report
    steps: tuple[StepReport, ...]
    sample: str


def optimize(
    model: Transformer,
    tokenizer: Tokenizer | None,
    recipe: Recipe,
    *,
    text: str | None = None,
    calibration: str | None = None,
    source: Path | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Runs a recipe on a model, measures what that cost, and saves the result in our own format.

    Args:
      model: the original, which stays as it is.
      tokenizer: of the text and of the sample answer.
      recipe: steps, and how to measure.
      text: to measure on; None for the one that ships with the package (`sample_text`).
      calibration: text that the steps may see, another than `text`; None: what the model itself says at temperature 1.
      source: the file or directory that the model came from, for the report.
      out: directory to save to; None saves nothing. Until the result is there, `OUT.run` beside it keeps the steps that
        are finished: the same call goes on after the last of them if it was interrupted.
      progress: called with (stage, parts of it done, of all).

    Raises:
      ValueError: for a model without a tokenizer, a text of fewer than two tokens, sizes beyond the context, a
        calibration text that is too short or the same as `text`, or an interrupted run of another recipe, model or
        text.
      OSError: if `out` is something else than a checkpoint of ours, or the disk is full.
    """
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, and text can be neither scored nor generated without one"
        )
    measure = recipe.measure
    measure.check(model.config.max_seq_len)
    stage = lambda name: functools.partial(progress or _ignore, name)
    text = sample_text() if text is None else text
    ids = tokenizer.encode(text, add_special=False)
    evaluate.check_text(ids)
    if calibration is not None and calibration.strip() == text.strip():
        raise ValueError("a model cannot be calibrated on the text that it is measured on; give another")
    run = Steps(model, tokenizer, recipe, text=text, calibration=calibration, progress=progress or _ignore)
    folder = None if out is None else out.with_name(f"{out.name}.run")
    with Kept(folder, identity(model, recipe, ids, calibration)) as kept:
        finished = run.run(kept)
        small = finished.model
        old = _speed(model, measure, stage("timing the original"))
        new = _speed(small, measure, stage("timing the result"))
        sample = _answer(small, tokenizer, measure, stage("answering"))
        before = _report(model, source, finished.perplexity, 0.0, 1.0, old)
        if out is not None:  # which may be where the original was
            checkpoints.save(small, tokenizer, out)
        kept.remove()
    last = finished.steps[-1]
    after = _report(small, out, last.perplexity, last.kld_mean, last.same_top_p, new)
    return Outcome(model=small, before=before, after=after, steps=finished.steps, sample=sample)


def sample_text() -> str:
    """The text that ships with the package: 48 kB of the training split of WikiText-2, three articles."""
    return (importlib.resources.files("jaxopt_llm") / "data" / "wikitext.txt").read_text("utf-8")


def _ignore(stage: str, done: int, total: int) -> None: ...


def _speed(model: Transformer, measure: Measure, progress: Part) -> Speed:
    return evaluate.speed(
        model, prompt_tokens=measure.prompt_tokens, output_tokens=measure.output_tokens, progress=progress
    )


def _answer(model: Transformer, tokenizer: Tokenizer, measure: Measure, progress: Part) -> str:
    """To the question as a chat model is asked, or as other models continue it."""
    progress(0, 1)
    question = measure.question
    prompt: Prompt = [{"role": "user", "content": question}] if tokenizer.chat_templates else question
    (result,) = generate(model, tokenizer, [prompt], max_tokens=measure.answer_tokens)
    progress(1, 1)
    return result.text


def _report(
    model: Transformer, path: Path | None, perplexity: float, kld_mean: float, same_top_p: float, speed: Speed
) -> Report:
    return Report(
        parameters=num_params(model),
        file_bytes=None if path is None else checkpoints.file_bytes(path),
        bytes=num_bytes(model),
        zeros=num_zeros(model) / num_params(model),
        perplexity=perplexity,
        kld_mean=kld_mean,
        same_top_p=same_top_p,
        prefill_tokens_per_s=speed.prefill_tokens_per_s.median,
        decode_tokens_per_s=speed.decode_tokens_per_s.median,
    )
