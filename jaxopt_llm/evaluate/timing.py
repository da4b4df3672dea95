"""Speed of a model on this machine, through the engine."""

import contextlib
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp

from jaxopt_llm.engine import Engine, EngineConfig, Result, SamplingParams, Timeline
from jaxopt_llm.models import Transformer, num_bytes, weights

_READ = 2**28  # bytes: more than any cache holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over repeats: its median, smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median=statistics.median(values), low=min(values), high=max(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What sequences that start together get, over repeats.

    Attributes:
      prefill_tokens_per_s: tokens of all prompts over the time until every sequence has its first token.
      decode_tokens_per_s: of all sequences together, while all of them decode.
      ttft_ms: mean time to the first token.
      tpot_ms: mean time of a later token of one sequence.
      output_tokens_per_s: all tokens generated over the whole time.
      mbu: share of the machine's read bandwidth, measured beside it, that reading weights and cache once a step takes.
      programs: compiled in all.
      timeline: what the stages of a pipeline did in the last run; None where there is none.
    """

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    ttft_ms: Spread
    tpot_ms: Spread
    output_tokens_per_s: Spread
    mbu: Spread
    programs: int
    timeline: Timeline | None = None


def speed(
    model: Transformer,
    *,
    prompt_tokens: int = 96,
    output_tokens: int = 32,
    concurrency: int = 1,
    repeats: int = 3,
    config: EngineConfig | None = None,
    trim: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Times greedy generation through the engine, once it is compiled and warm.

    Args:
      model: any model.
      prompt_tokens: length of each prompt; its ids are arbitrary.
      output_tokens: tokens that each sequence generates, of which the first counts as prefill.
      concurrency: sequences that run together.
      repeats: timed runs.
      config: of the engine; there is no prefix cache, as all runs have the same prompts.
      trim: whether its slots, context and pages follow from the other arguments.
      progress: called with (runs done, of all), the warm-up included.

    Raises:
      ValueError: for numbers too small, or more tokens than the model's context.
    """
    check_lengths(prompt_tokens=prompt_tokens, output_tokens=output_tokens, context=model.config.max_seq_len)
    for name, value in (("repeats", repeats), ("concurrency", concurrency)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    report = progress or (lambda done, total: None)
    context = prompt_tokens + output_tokens
    sizes = dataclasses.replace(config or EngineConfig(), prefix_cache=False)
    if trim:
        sizes = dataclasses.replace(
            sizes, max_slots=concurrency, max_seq_len=context, cache_tokens=concurrency * context
        )
    engine = Engine(model, config=sizes)
    runs = []
    watched = engine.watched if engine.stages > 1 and engine.processes == 1 else contextlib.nullcontext
    for run in range(1 + repeats):  # the first compiles what all of them take, and is not timed
        report(run, 1 + repeats)
        with watched() as timeline:
            runs.append(_run(engine, prompt_tokens, output_tokens, concurrency))
    report(1 + repeats, 1 + repeats)
    timed = runs[1:]
    step_bytes = _bytes_of_step(model, engine, context - output_tokens // 2, concurrency)
    programs = engine.metrics().programs
    found = _summary(timed, prompt_tokens, step_bytes / read_bandwidth(), programs)
    return dataclasses.replace(found, timeline=timeline)


def read_bandwidth() -> float:
    """Bytes a second that the default device reads at best: a product with a vector, and a sum a core, over 256 MB.

    XLA shares out neither perfectly on a CPU; the faster of a few runs of both counts.
    """
    array, vector = jnp.zeros((_READ // 4 // 4096, 4096), jnp.float32), jnp.zeros(4096, jnp.float32)
    parts = os.cpu_count() or 1
    rows = array.shape[0] // parts * parts
    ways = (jax.jit(lambda a, v: a @ v), jax.jit(lambda a, v: a[:rows].reshape(parts, -1).sum(1)))
    times = []
    for way in ways:
        way(array, vector).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            way(array, vector).block_until_ready()
            times.append(time.perf_counter() - start)
    return _READ / min(times)


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


def _run(engine: Engine, prompt_tokens: int, output_tokens: int, concurrency: int) -> list[Result]:
    vocab = engine.model_config.vocab_size
    prompts = [[(i + 7 * n) % vocab for i in range(prompt_tokens)] for n in range(concurrency)]
    return engine.generate(prompts, SamplingParams(max_tokens=output_tokens, ignore_eos=True))


def _bytes_of_step(model: Transformer, engine: Engine, context: int, concurrency: int) -> int:
    """Weights and cache that one step of decoding reads."""
    table = 0 if model.config.tied else weights(model)["embed.weight"].nbytes  # of which a step reads a row
    return num_bytes(model) - table + concurrency * context * engine.kv_bytes_per_token


def _summary(runs: Sequence[Sequence[Result]], prompt_tokens: int, step_s: float, programs: int) -> Speed:
    """Args: the results of each run; length of a prompt; seconds of a step at the machine's bandwidth; programs."""
    over = lambda figure: Spread.of([figure(run) for run in runs])
    first = lambda run: max(result.token_ms[0] for result in run) / 1e3
    last = lambda run: max(result.token_ms[-1] for result in run) / 1e3
    return Speed(
        prefill_tokens_per_s=over(lambda run: len(run) * prompt_tokens / first(run)),
        decode_tokens_per_s=over(_decode_rate),
        ttft_ms=over(lambda run: statistics.mean(result.ttft_ms for result in run)),
        tpot_ms=over(lambda run: statistics.mean(result.tpot_ms for result in run)),
        output_tokens_per_s=over(lambda run: sum(len(result.token_ids) for result in run) / last(run)),
        mbu=over(lambda run: step_s * _decode_rate(run) / len(run)),
        programs=programs,
    )


def _decode_rate(run: Sequence[Result]) -> float:
    """Tokens a second from when the last sequence has its first token until the first one has its last.

    A dispatch gives its tokens to all sequences at once, yet each counts from its own call: times that differ by less
    than half a dispatch are one.
    """
    late = max(run, key=lambda result: result.token_ms[0]).token_ms
    slack = statistics.median(b - a for a, b in itertools.pairwise(sorted(set(late)))) / 2
    start, end = late[0], min(result.token_ms[-1] for result in run) + slack
    last = max(at for at in late if at <= max(start, end))
    if last == start:
        raise ValueError(
            "some sequences ended before all had started; take more output_tokens, or less concurrency"
        )
    count = sum(start + slack < at <= end for result in run for at in result.token_ms)
    return count * 1e3 / (last - start)
