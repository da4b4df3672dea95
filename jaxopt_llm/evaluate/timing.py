"""Speed of a model on this machine."""

import dataclasses
import statistics
from collections.abc import Callable

from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one sequence alone gets, medians over repeats.

    Attributes:
      prefill_tokens_per_s: prompt tokens over the time to the first token.
      decode_tokens_per_s: later tokens over the time they took.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def speed(
    model: Transformer,
    *,
    prompt_tokens: int = 96,
    output_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Times greedy generation through the engine, once it is compiled and warm.

    Args:
      model: any model.
      prompt_tokens: length of the prompt; its ids are arbitrary.
      output_tokens: tokens generated, of which the first counts as prefill.
      repeats: timed runs.
      progress: called with (runs done, of all), the warm-up included.

    Raises:
      ValueError: for numbers too small, or more tokens than the model's context.
    """
    check_lengths(prompt_tokens=prompt_tokens, output_tokens=output_tokens, context=model.config.max_seq_len)
    if repeats < 1:
        raise ValueError(f"{repeats=} must be at least 1")
    report = progress or (lambda done, total: None)
    config = EngineConfig(max_slots=1, max_seq_len=prompt_tokens + output_tokens, prefix_cache=False)
    engine = Engine(model, config=config)
    prompt = [i % model.config.vocab_size for i in range(prompt_tokens)]
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    report(0, 1 + repeats)
    engine.warm_up(prompt_tokens=prompt_tokens, rows=1)
    results = []
    for run in range(repeats):
        report(1 + run, 1 + repeats)
        results += engine.generate([prompt], params)
    report(1 + repeats, 1 + repeats)
    return Speed(
        prefill_tokens_per_s=statistics.median(prompt_tokens * 1e3 / r.ttft_ms for r in results),
        decode_tokens_per_s=statistics.median(1e3 / r.tpot_ms for r in results if r.tpot_ms is not None),
    )


def check_lengths(*, prompt_tokens: int, output_tokens: int, context: int | None = None) -> None:
    """Raises ValueError for lengths that leave nothing to time (see `speed`), or beyond a model's context."""
    if prompt_tokens < 1:
        raise ValueError(f"{prompt_tokens=} must be at least 1")
    if output_tokens < 2:
        raise ValueError(f"{output_tokens=} must be at least 2: the first counts as prefill")
    if context is not None and prompt_tokens + output_tokens > context:
        raise ValueError(
            f"{prompt_tokens=} and {output_tokens=} are more than the model's context of {context}; take fewer"
        )
