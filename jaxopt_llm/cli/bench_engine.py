"""Time the engine on a model: prefill and decode of sequences that start together, once all is compiled.

Figures are medians over the repeats. mbu is the share of the machine's read bandwidth, measured in the same run, that
reading the weights and the cache once a step takes. Runs that --append collects are what `size --calibrate` fits to.
On a mesh with stages each stage's busy share is told too: of the time in which all of them decode, in the last run.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxopt_llm import checkpoints, evaluate, report, size
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import CONCURRENCY, HOSTS, JSON, LOADING, MODEL, OUTPUT_TOKENS, SET
from jaxopt_llm.cli.hosts import together
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.cli.serving import SERVING, engine_of, loading_of, model_of, serving
from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import Transformer, weights
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import chip_of

PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Length of each prompt.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs.")
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", None, "Type of keys and values: float32, bfloat16, float16, int8. Unset: the model's."
)
APPEND = flags.DEFINE_string("append", None, "File of runs to add this one to, for size --calibrate.")
SCHEDULE = flags.DEFINE_string(
    "schedule", None, "File to draw the stages' schedule in: stage against time. .svg or .png"
)


def main(argv: Sequence[str]) -> None:
    output_tokens = 128 if OUTPUT_TOKENS.value is None else OUTPUT_TOKENS.value
    evaluate.check_lengths(prompt_tokens=PROMPT_TOKENS.value, output_tokens=output_tokens)
    config = serving(SERVING.value, SET.value)
    sizes, loading = engine_of(config, EngineConfig()), loading_of(config, LOADING.value)
    if CACHE_DTYPE.value is not None:
        sizes = dataclasses.replace(sizes, cache_dtype=CACHE_DTYPE.value)
    alone = 1 if config is None else sizes.max_slots
    concurrency = alone if CONCURRENCY.value is None else CONCURRENCY.value
    if config is not None:
        _check_room(sizes, concurrency, PROMPT_TOKENS.value + output_tokens)
    if APPEND.value is not None:
        _check_append(Path(APPEND.value), loading, sizes)
    mesh = loading.get("mesh")
    if SCHEDULE.value is not None:
        report.check_plot("schedule", Path(SCHEDULE.value))
        if mesh in (None, checkpoints.AUTO) or MeshSpec.parse(mesh).stage == 1:
            raise ValueError("--schedule draws the stages of a pipeline; add --mesh=stage=2, or drop it")
    with together(HOSTS.value, mesh):
        measure(model_of(config, MODEL), loading, sizes, (concurrency, output_tokens), trim=config is None)


def measure(
    source: str, loading: Mapping[str, Any], sizes: EngineConfig, asked: tuple[int, int], *, trim: bool
) -> None:
    """Loads the model, times it under a load of so many sequences and tokens of each, and prints the figures."""
    concurrency, output_tokens = asked
    model, _ = load(source, **loading)
    quantize = loading.get("quantize")
    if APPEND.value is not None and quantize is None and _is_rounded(model):
        raise ValueError(
            "--append: the checkpoint's weights are rounded already; name one of floats, and --quantize"
        )
    with stages("runs") as progress:
        found = evaluate.speed(
            model,
            prompt_tokens=PROMPT_TOKENS.value,
            output_tokens=output_tokens,
            concurrency=concurrency,
            repeats=REPEATS.value,
            config=sizes,
            trim=trim,
            progress=functools.partial(progress, "timing"),
        )
    if APPEND.value is not None:
        chip = chip_of(jax.devices()[0]) or size.here()
        run = size.Run.of(
            found,
            config=model.config,
            chip=chip,
            weights=size.FLOAT if quantize is None else quantize,
            kv=size.FLOAT if sizes.cache_dtype is None else sizes.cache_dtype,
            prompt_tokens=PROMPT_TOKENS.value,
            output_tokens=output_tokens,
            concurrency=concurrency,
        )
        size.append_run(Path(APPEND.value), run)
    if found.timeline is not None and SCHEDULE.value is not None:
        report.draw_schedule(found.timeline, Path(SCHEDULE.value))
    busy = found.timeline.busy() if found.timeline is not None else []
    figures = {name: value for name, value in vars(found).items() if isinstance(value, evaluate.Spread)}
    if JSON.value:
        medians = {name: spread.median for name, spread in figures.items()}
        spread = {name: [s.low, s.high] for name, s in figures.items()}
        of_stages = {"busy": busy} if busy else {}
        show.json_line(medians | {"spread": spread, "programs": found.programs} | of_stages)
    else:
        rows: list[tuple[Any, ...]] = [(name, s.median, s.low, s.high) for name, s in figures.items()]
        rows.append(("programs", found.programs, None, None))
        rows += [(f"stage {stage}, busy share", share, None, None) for stage, share in enumerate(busy)]
        show.table(("", "median", "low", "high"), rows)


def _check_room(sizes: EngineConfig, concurrency: int, tokens: int) -> None:
    """Refuses what the config's engine would let wait, or has no room for."""
    for name, asked, most in (
        ("sequences at once", concurrency, sizes.max_slots),
        ("tokens of a prompt and its output", tokens, sizes.max_seq_len),
        ("tokens of all sequences", concurrency * tokens, sizes.cache_tokens),
    ):
        if most is not None and asked > most:
            raise ValueError(
                f"{asked:,} {name} are more than the {most:,} of --config={SERVING.value}; ask for fewer, or --set "
                "engine.max_slots, engine.max_seq_len and engine.cache_tokens"
            )


def _check_append(path: Path, loading: Mapping[str, Any], sizes: EngineConfig) -> None:
    """Refuses, before anything is loaded, what a run in the file could not say."""
    for name in ("dtype", "mesh"):
        if loading.get(name) is not None:
            raise ValueError(
                f"--append takes no --{name} yet: size --calibrate has no word for it; leave it out"
            )
    if sizes.cache_dtype not in (None, "int8"):
        raise ValueError(
            f"--append takes no --cache_dtype={sizes.cache_dtype}: size knows the model's own, and int8"
        )
    if sizes.max_tokens_per_step != EngineConfig.max_tokens_per_step:
        raise ValueError(
            f"--append takes no engine.max_tokens_per_step={sizes.max_tokens_per_step}: size --calibrate "
            f"knows steps of {EngineConfig.max_tokens_per_step} tokens; leave it out"
        )
    if path.exists():
        size.read_runs(path)


def _is_rounded(model: Transformer) -> bool:
    return any(isinstance(value, QArray) for value in weights(model).values())
