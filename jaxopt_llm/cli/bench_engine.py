"""Time the engine on a model: prefill and decode of sequences that start together, once all is compiled.

Figures are medians over the repeats. mbu is the share of the machine's read bandwidth, measured in the same run, that
reading the weights and the cache once a step takes.
"""

import functools
from collections.abc import Sequence

from absl import flags

from jaxopt_llm import evaluate
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import CONCURRENCY, JSON, LOADING, MODEL, OUTPUT_TOKENS
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.engine import EngineConfig

PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 512, "Length of each prompt.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs.")
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype", None, "Type of keys and values: float32, bfloat16, float16, int8. Unset: the model's."
)


def main(argv: Sequence[str]) -> None:
    output_tokens = 128 if OUTPUT_TOKENS.value is None else OUTPUT_TOKENS.value
    evaluate.check_lengths(prompt_tokens=PROMPT_TOKENS.value, output_tokens=output_tokens)
    config = EngineConfig(cache_dtype=CACHE_DTYPE.value)
    model, _ = load(MODEL.value, **LOADING.value)
    with stages("runs") as report:
        found = evaluate.speed(
            model,
            prompt_tokens=PROMPT_TOKENS.value,
            output_tokens=output_tokens,
            concurrency=1 if CONCURRENCY.value is None else CONCURRENCY.value,
            repeats=REPEATS.value,
            config=config,
            progress=functools.partial(report, "timing"),
        )
    figures = {name: value for name, value in vars(found).items() if isinstance(value, evaluate.Spread)}
    if JSON.value:
        medians = {name: spread.median for name, spread in figures.items()}
        spread = {name: [s.low, s.high] for name, s in figures.items()}
        show.json_line(medians | {"spread": spread, "programs": found.programs})
    else:
        rows = [(name, s.median, s.low, s.high) for name, s in figures.items()]
        show.table(("", "median", "low", "high"), [*rows, ("programs", found.programs, None, None)])
