"""Time the engine on a model: prefill and decode of sequences that start together, once all is compiled.

Figures are medians over the repeats. mbu is the share of the machine's read bandwidth, measured in the same run, that
reading the weights and the cache once a step takes. Runs that --append collects are what `size --calibrate` fits to.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxopt_llm import evaluate, size
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import CONCURRENCY, JSON, LOADING, MODEL, OUTPUT_TOKENS
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import Transformer, weights
from jaxopt_llm.sharding.chips import chip_of

PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Length of each prompt.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs.")
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", None, "Type of keys and values: float32, bfloat16, float16, int8. Unset: the model's."
)
APPEND = flags.DEFINE_string("append", None, "File of runs to add this one to, for size --calibrate.")


def main(argv: Sequence[str]) -> None:
    output_tokens = 128 if OUTPUT_TOKENS.value is None else OUTPUT_TOKENS.value
    evaluate.check_lengths(prompt_tokens=PROMPT_TOKENS.value, output_tokens=output_tokens)
    config = EngineConfig(cache_dtype=CACHE_DTYPE.value)
    concurrency = 1 if CONCURRENCY.value is None else CONCURRENCY.value
    if APPEND.value is not None:
        _check_append(Path(APPEND.value), LOADING.value)
    model, _ = load(MODEL.value, **LOADING.value)
    quantize = LOADING.value.get("quantize")
    if APPEND.value is not None and quantize is None and _is_rounded(model):
        raise ValueError(
            "--append: the checkpoint's weights are rounded already; name one of floats, and --quantize"
        )
    with stages("runs") as report:
        found = evaluate.speed(
            model,
            prompt_tokens=PROMPT_TOKENS.value,
            output_tokens=output_tokens,
            concurrency=concurrency,
            repeats=REPEATS.value,
            config=config,
            progress=functools.partial(report, "timing"),
        )
    if APPEND.value is not None:
        chip = chip_of(jax.devices()[0]) or size.here()
        run = size.Run.of(
            found,
            config=model.config,
            chip=chip,
            weights=size.FLOAT if quantize is None else quantize,
            kv=size.FLOAT if CACHE_DTYPE.value is None else CACHE_DTYPE.value,
            prompt_tokens=PROMPT_TOKENS.value,
            output_tokens=output_tokens,
            concurrency=concurrency,
        )
        size.append_run(Path(APPEND.value), run)
    figures = {name: value for name, value in vars(found).items() if isinstance(value, evaluate.Spread)}
    if JSON.value:
        medians = {name: spread.median for name, spread in figures.items()}
        spread = {name: [s.low, s.high] for name, s in figures.items()}
        show.json_line(medians | {"spread": spread, "programs": found.programs})
    else:
        rows = [(name, s.median, s.low, s.high) for name, s in figures.items()]
        show.table(("", "median", "low", "high"), [*rows, ("programs", found.programs, None, None)])


def _check_append(path: Path, loading: Mapping[str, Any]) -> None:
    """Refuses, before anything is loaded, what a run in the file could not say."""
    for name in ("dtype", "mesh"):
        if loading.get(name) is not None:
            raise ValueError(
                f"--append takes no --{name} yet: size --calibrate has no word for it; leave it out"
            )
    if CACHE_DTYPE.value not in (None, "int8"):
        raise ValueError(
            f"--append takes no --cache_dtype={CACHE_DTYPE.value}: size knows the model's own, and int8"
        )
    if path.exists():
        size.read_runs(path)


def _is_rounded(model: Transformer) -> bool:
    return any(isinstance(value, QArray) for value in weights(model).values())
