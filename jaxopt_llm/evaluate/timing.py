"""Speed of a model on this machine."""

import dataclasses
import statistics
from collections.abc import Callable

from jaxopt_llm.engine import Generator, SamplingParams
from jaxopt_llm.models import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What one sequence alone gets, medians over repeats.

    Attributes:
      prefill_tokens_per_s: prompt tokens over the time to the first token.
      decode_tokens_per_s: later tokens over the time they took.
      prompt_tokens, decode_tokens: how many of each were timed.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    decode_tokens: int


def speed(
    model: Transformer,
    *,
    prompt_tokens: int = 128,
    decode_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Times greedy generation through the engine, once it is compiled and warm.

    Args:
      model: any model.
      prompt_tokens: length of the prompt; its ids are arbitrary.
      decode_tokens: tokens generated after the first, which counts as prefill.
      repeats: timed runs.
      progress: called with (runs done, of all), the warm-up included.

    Raises:
      ValueError: for numbers below 1, or more tokens than the model's context.
    """
    sizes = {"prompt_tokens": prompt_tokens, "decode_tokens": decode_tokens, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    total, context = prompt_tokens + 1 + decode_tokens, model.config.max_seq_len
    if total > context:
        raise ValueError(
            f"{prompt_tokens=} and {decode_tokens=} make {total} with the token between, more than the model's "
            f"context of {context}; take fewer"
        )
    generator = Generator(model)
    prompt = [i % model.config.vocab_size for i in range(prompt_tokens)]
    params = SamplingParams(max_tokens=1 + decode_tokens, ignore_eos=True)
    prefill, decode = [], []
    for run in range(1 + repeats):
        if progress:
            progress(run, 1 + repeats)
        if run == 0:
            generator.warm_up(prompt, params)
            continue
        (result,) = generator.generate([prompt], params)
        assert result.tpot_ms is not None  # two tokens at least
        prefill.append(prompt_tokens * 1e3 / result.ttft_ms)
        decode.append(1e3 / result.tpot_ms)
    if progress:
        progress(1 + repeats, 1 + repeats)
    return Speed(
        prefill_tokens_per_s=statistics.median(prefill),
        decode_tokens_per_s=statistics.median(decode),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
    )
