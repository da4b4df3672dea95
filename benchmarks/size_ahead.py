"""What `size` counts against what the TPU compiler says, for Llama-3.1-8B on a slice of each version. Needs libtpu.

    python -m benchmarks.size_ahead [--slices=v5e:2x4,v6e:2x4,v5p:2x2x2,tpu7x:2x2x1] [--weights=bf16,int8,w8a8]

The engine's decode and prefill steps are compiled over all devices of a slice as tensor shards, in bfloat16, rounded to
int8, and with activations rounded too; a 70B model in bfloat16 on a v5e 2x2 must be refused. Each pair takes one to two
minutes on two cores. The exit code is 1 where bytes of a chip differ by more than 5 %, where a layer has other
collectives than two sums of bfloat16, or where the compiler's verdict is another than expected. Writes
benchmarks/results/size_ahead.json, pair after pair.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.record import record
from jaxopt_llm import checkpoints
from jaxopt_llm import size as sizing
from jaxopt_llm.cli import show
from jaxopt_llm.models import ModelConfig

_CONFIGS = flags.DEFINE_string(
    "configs", "../shared/model-configs", "Folder with a config.json for each model."
)
_SLICES = flags.DEFINE_list("slices", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"], "Which slices.")
_WEIGHTS = flags.DEFINE_list("weights", ["bf16", "int8", "w8a8"], "Which forms of weights.")
_LIMIT = 0.05
_TRAFFIC = sizing.traffic(prompt=(1024, 1024), output=(256, 256), concurrency=16, requests=16)


def main(_: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    small, large = (_config(name) for name in ("Llama-3.1-8B", "Llama-3.1-70B"))
    for name in _SLICES.value:
        for weights in _WEIGHTS.value:
            rows.append(_row(small, name, weights))
            record("size_ahead", {"rows": rows})
    found = _found(large, "v5e:2x2", "bf16")
    refusal = found.compiled and found.compiled.refusal
    rows_wrong = [row for row in rows if row["wrong"]]
    record("size_ahead", {"rows": rows, "refusal_of_70b": refusal})
    columns = ("slice", "weights", "counted_bytes", "compiled_bytes", "error", "collectives", "wrong")
    show.table(columns, [[row[column] for column in columns] for row in rows], right=(2, 3, 4))
    print(f"70B in bfloat16 on v5e:2x2: {refusal}")
    sys.exit(1 if rows_wrong or not (refusal and "RESOURCE_EXHAUSTED" in refusal) else 0)


def _config(name: str) -> ModelConfig:
    config, _ = checkpoints.read_config(str(Path(_CONFIGS.value) / name))
    return config


def _found(config: ModelConfig, name: str, weights: str) -> sizing.Candidate:
    """All devices of a slice as tensor shards."""
    chip, layout = name.split(":")
    (known,) = sizing.chips_of([chip])
    shards = sizing.Topology.parse(known, layout).devices
    ranked = sizing.sweep(
        config, _TRAFFIC, chips=[known], topology=layout, mesh=f"tensor={shards}", weights=[weights]
    )
    (found,) = sizing.confirm(ranked, config, _TRAFFIC, chips=[known])
    return found


def _row(config: ModelConfig, name: str, weights: str) -> dict[str, Any]:
    found = _found(config, name, weights)
    compiled = found.compiled
    if compiled is None or compiled.decode is None or compiled.prefill is None:
        raise ValueError(f"{name}: {found.not_compiled or (compiled and compiled.refusal)}")
    counted = sum(found.bytes_per_chip)
    needed = max(compiled.decode.nbytes, compiled.prefill.nbytes)
    sums = {c.kind: c for c in compiled.decode.collectives}
    rows, layers = found.batch, config.num_layers
    expected = (2 * layers + 1, (2 * layers + 1) * rows * config.d_model * 2)
    alike = "all-reduce" in sums and (sums["all-reduce"].count, sums["all-reduce"].nbytes) == expected
    error = counted / needed - 1
    return {
        "slice": name,
        "weights": weights,
        "counted": found.bytes_per_chip._asdict(),
        "compiled": dataclasses.asdict(compiled),
        "counted_bytes": counted,
        "compiled_bytes": needed,
        "error": round(error, 4),
        "collectives": ", ".join(f"{c.count} {c.kind}" for c in sums.values()),
        "wrong": abs(error) > _LIMIT or not alike or not compiled.fits,
    }


if __name__ == "__main__":
    app.run(main)
