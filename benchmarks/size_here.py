"""What `size --calibrate` predicts of this machine: factors fitted to two shapes, a third four times as large.

    python -m benchmarks.size_here [--format=int8_block]

Random weights. Two shapes are timed through the engine, one and two sequences at a time, after prompts of three
lengths. The third has at least four times the bytes of the larger of them and runs four times as many sequences. The
exit code is 1 where the predicted time of its decode step is more than 20 % off. Writes
benchmarks/results/size_here.json, or another `--result`. Needs a quiet machine: `load` in the record is how many
programs ran or wanted to before it began.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.record import record
from benchmarks.step import random_model
from jaxopt_llm import evaluate
from jaxopt_llm import size as sizing
from jaxopt_llm.models import ModelConfig, Rope, num_bytes
from jaxopt_llm.sharding.chips import Chip, chip_of

_FORMAT = flags.DEFINE_string("format", "int8_block", "Form of weights.")
_RESULT = flags.DEFINE_string("result", "size_here", "Name of the file with the result.")
_OUTPUT = 32
_LIMIT = 0.20


def shape(layers: int, d_model: int, d_ff: int) -> ModelConfig:
    """Of a Llama, heads of 64 in groups of two."""
    return ModelConfig(
        family="llama", vocab_size=16384, d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=d_model // 64,
        num_kv_heads=d_model // 128, head_dim=64, max_seq_len=1024, windows=(None,) * layers, rope=Rope(),
    )  # fmt: skip


CALIBRATED = (shape(12, 768, 2048), shape(13, 896, 2432))  # more than the caches of a core hold
PREDICTED = shape(20, 1536, 4608)
BATCHES, BATCH = (1, 2), 8
PROMPTS, PROMPT = (64, 256, 768), 256


def main(_: Sequence[str]) -> None:
    load = os.getloadavg()[0]
    chip = chip_of(jax.devices()[0]) or sizing.here()
    runs = [
        _run(config, chip, batch, prompt) for config in CALIBRATED for batch in BATCHES for prompt in PROMPTS
    ]
    large = _run(PREDICTED, chip, BATCH, PROMPT)
    sizes = [_nbytes(config) for config in (*CALIBRATED, PREDICTED)]
    if sizes[-1] < 4 * max(sizes[:-1]):
        raise ValueError(
            f"the third shape has {sizes[-1]:,} bytes, not four times those of the others: {sizes}"
        )
    factors = sizing.fit(runs)
    prefill, step = large.predicted(factors)
    error = step / large.step_s - 1
    rows = [
        {
            "bytes": _nbytes(run.config),
            "sequences": run.concurrency,
            "prompt_tokens": run.prompt_tokens,
            "prefill_s": run.prefill_s,
            "step_s": run.step_s,
        }
        for run in (*runs, large)
    ]
    found = {
        "format": _FORMAT.value,
        "load": load,
        "runs": rows,
        "factors": vars(factors),
        "untold": sizing.untold(runs),
        "held_out": [{"prefill": one.prefill, "step": one.step} for one in sizing.held_out(runs)],
        "predicted": {"prefill_s": prefill, "step_s": step},
        "step_error": error,
        "prefill_error": prefill / large.prefill_s - 1,
    }
    record(_RESULT.value, found)
    sys.exit(1 if abs(error) > _LIMIT else 0)


def _model(config: ModelConfig) -> Any:
    return random_model(config, _FORMAT.value, jnp.dtype(jnp.float32))


def _nbytes(config: ModelConfig) -> int:
    return num_bytes(_model(config))


def _run(config: ModelConfig, chip: Chip, batch: int, prompt: int) -> sizing.Run:
    found = evaluate.speed(_model(config), prompt_tokens=prompt, output_tokens=_OUTPUT, concurrency=batch)
    return sizing.Run.of(
        found,
        config=config,
        chip=chip,
        weights=_FORMAT.value,
        kv=sizing.FLOAT,
        prompt_tokens=prompt,
        output_tokens=_OUTPUT,
        concurrency=batch,
    )


if __name__ == "__main__":
    app.run(main)
