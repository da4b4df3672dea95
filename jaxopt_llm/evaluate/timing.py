"""Speed of a model on this machine."""

import dataclasses
import statistics

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
    model: Transformer, *, prompt_tokens: int = 128, decode_tokens: int = 32, repeats: int = 3
) -> Speed:
    """Times greedy generation through the engine, after one run to compile and warm up.

    Args:
      model: any model.
      prompt_tokens: length of the prompt; its ids are arbitrary.
      decode_tokens: tokens generated after the first, which counts as prefill.
      repeats: timed runs.

    Raises:
      ValueError: for numbers below 1, or more tokens than the model's context.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("decode_tokens", decode_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    total, context = prompt_tokens + decode_tokens + 1, model.config.max_seq_len
    if total > context:
        raise ValueError(
            f"{prompt_tokens=} and {decode_tokens=} make {total} tokens, and the context is {context}; take fewer"
        )
    generator = Generator(model)
    prompt = [i % model.config.vocab_size for i in range(prompt_tokens)]
    params = SamplingParams(max_tokens=decode_tokens + 1, ignore_eos=True)
    results = [generator.generate([prompt], params)[0] for _ in range(1 + repeats)][1:]
    return Speed(
        prefill_tokens_per_s=prompt_tokens * 1e3 / statistics.median(r.ttft_ms for r in results),
        decode_tokens_per_s=1e3 / statistics.median(r.tpot_ms for r in results if r.tpot_ms is not None),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
    )
