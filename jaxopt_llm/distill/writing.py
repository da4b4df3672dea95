"""Text that models write to learn from: the teacher's before training, the student's own while it lasts."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxopt_llm.calibrate import continued
from jaxopt_llm.distill.config import OnPolicy, Written
from jaxopt_llm.distill.data import Ids
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import Transformer

Progress = Callable[[int, int], None]


def write(
    teacher: Transformer,
    settings: Written,
    texts: Sequence[Ids],
    seed: int,
    progress: Progress | None,
) -> list[list[int]]:
    """Token ids of sequences that the teacher writes, beginnings included.

    Args:
      teacher: any model.
      settings: how many, how long.
      texts: token ids in the teacher's vocabulary to take beginnings from.
      seed: of the beginnings and of the sampling.
      progress: called with (sequences done, of all).

    Raises:
      ValueError: if it has no first token to begin with, or lengths beyond the teacher's context.
    """
    prompts = _beginnings(teacher, settings, texts, np.random.default_rng(seed))
    return continued(
        teacher,
        prompts,
        length=settings.tokens,
        temperature=settings.temperature,
        seed=seed,
        progress=progress,
    )


def _beginnings(
    teacher: Transformer, settings: Written, texts: Sequence[Ids], draw: np.random.Generator
) -> list[list[int]]:
    long_enough = [ids for ids in texts if len(ids) > settings.prompt]
    if settings.prompt and long_enough:
        joined = np.concatenate(long_enough)
        starts = draw.integers(len(joined) - settings.prompt, size=settings.sequences)
        return [joined[start : start + settings.prompt].tolist() for start in starts]
    first = next((i for i in (teacher.config.bos_id, *teacher.config.eos_ids) if i is not None), None)
    if first is None:
        raise ValueError(
            "the teacher's config names no first token to write from; give texts and set written.prompt"
        )
    return [[first]] * settings.sequences


class Author:
    """The student as it writes its own batches.

    Args:
      student: of the shapes that are trained.
      settings: how it samples.
      batch, length: windows of a batch, and tokens of each.
    """

    def __init__(self, student: Transformer, settings: OnPolicy, *, batch: int, length: int):
        self._settings = settings
        sizes = EngineConfig.fitting(student.config, requests=batch, tokens=length)
        self._engine = Engine(student, None, sizes)

    def rewrite(
        self, student: Transformer, tokens: Int[np.ndarray, "B T"], seed: int
    ) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Windows as the student continues their beginnings, and which of its predictions count: those it drew.

        The tokens are data: no gradient goes through how they were drawn.
        """
        batch, length = tokens.shape
        prompt = self._settings.prompt
        self._engine.update(student)
        results = self._engine.generate(
            tokens[:, :prompt].tolist(),
            [
                SamplingParams(
                    max_tokens=length - prompt, temperature=self._settings.temperature, seed=seed + row
                )
                for row in range(batch)
            ],
        )
        written, counted = np.array(tokens), np.zeros((batch, length), bool)
        for row, result in enumerate(results):
            end = prompt + len(result.token_ids)
            written[row, prompt:end] = result.token_ids
            counted[row, prompt - 1 : end - 1] = True
        return written, counted
