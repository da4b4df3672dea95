"""The engine beside llama.cpp on SmolLM2-135M, one after the other in turns: prefill, decode alone and of eight.

    python -m benchmarks.engine_llama_cpp --peer=PYTHON --models=DIR [--rounds=3]

PYTHON has llama-cpp-python; DIR holds its forms of the model, `q8_0.gguf` and `q4_0.gguf`. Each round runs every engine
once, so that a busy moment meets all; figures are medians over the rounds, with the load before each. llama.cpp
collapses when its threads are disturbed: run it on an idle machine. Writes benchmarks/results/engine_llama_cpp.json.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.peer import PEER
from benchmarks.record import data_folder, record

_MODELS = flags.DEFINE_string("models", None, "Folder of q8_0.gguf and q4_0.gguf.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of every engine.", lower_bound=1)

OURS = {
    "int8_block": ("--quantize=int8_block",),
    "int4": ("--quantize=int4",),
    "native Q4_1": ("--dtype=native",),
}
PEERS = ("q8_0", "q4_0")
BATCH = 8


def last_json(command: Sequence[str]) -> dict[str, Any]:
    """The object that a command prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(options: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, *"-m jaxopt_llm bench engine --json".split(), *options]
    alone = last_json(command)
    together = last_json([*command, f"--concurrency={BATCH}", "--prompt_tokens=64"])
    return {
        "prefill_512": alone["prefill_tokens_per_s"],
        "decode_at_512": alone["decode_tokens_per_s"],
        "mbu": alone["mbu"],
        f"decode_batch_{BATCH}": together["decode_tokens_per_s"],
    }


def theirs(form: str) -> dict[str, float]:
    script = data_folder().parent / "peers" / "llama_cpp_speed.py"
    found = last_json(
        [PEER.value, str(script), str(Path(_MODELS.value) / f"{form}.gguf"), f"--batch={BATCH}"]
    )
    return {key: found[key] for key in ("prefill_512", "decode_at_512", f"decode_batch_{BATCH}")}


def main(argv: Sequence[str]) -> None:
    del argv
    runs: dict[str, list[dict[str, float]]] = {}
    loads = []
    for _ in range(_ROUNDS.value):
        for name, options in OURS.items():
            loads.append(os.getloadavg()[0])
            runs.setdefault(name, []).append(ours(options))
        for form in PEERS:
            runs.setdefault(f"llama.cpp {form}", []).append(theirs(form))
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    ratio = lambda mine, other, key: medians[mine][key] / medians[f"llama.cpp {other}"][key]
    ratios = {
        f"{mine} / {other}, {key}": ratio(mine, other, key)
        for mine, other in (("int8_block", "q8_0"), ("int4", "q4_0"), ("native Q4_1", "q4_0"))
        for key in ("prefill_512", "decode_at_512", f"decode_batch_{BATCH}")
    }
    record(Path(__file__).stem, {"medians": medians, "ratios": ratios, "runs": runs, "loads_before": loads})


if __name__ == "__main__":
    app.run(main)
