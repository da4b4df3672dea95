"""The engine beside llama.cpp and OpenVINO on SmolLM2-135M, in turns: prefill, decode alone and of eight.

    python -m benchmarks.engine_peers --peer=PYTHON --models=DIR [--openvino=PYTHON2] [--rounds=3]

PYTHON has llama-cpp-python, PYTHON2 openvino-genai; DIR holds their forms of the model: `q8_0.gguf`, `q4_0.gguf`,
`openvino-int8/`, `openvino-int4/`. Each round runs every engine once, so that a busy moment meets all; figures are
medians over the rounds, with the load before each. llama.cpp collapses when its threads are disturbed: run it on an
idle machine. Writes benchmarks/results/engine_peers.json, or that of another --name.
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

from benchmarks import peer
from benchmarks.peer import PEER
from benchmarks.record import data_folder, record

_MODELS = flags.DEFINE_string("models", None, "Folder of q8_0.gguf and q4_0.gguf.", required=True)
_OPENVINO = flags.DEFINE_string("openvino", None, "Python interpreter with openvino-genai.")
_NAME = flags.DEFINE_string("name", Path(__file__).stem, "Of the file with the result.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of every engine.", lower_bound=1)

OURS = {
    "int8_block": ("--quantize=int8_block",),
    "int4": ("--quantize=int4",),
    "native Q4_1": ("--dtype=native",),
}
LLAMA_CPP = ("q8_0", "q4_0")
OPENVINO = ("int8", "int4")
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


def theirs(python: str, script: str, model: str, *options: str) -> dict[str, float]:
    path = data_folder().parent / "peers" / script
    found = last_json([python, str(path), str(Path(_MODELS.value) / model), *options])
    keys = ("prefill_512", "decode_at_512", f"decode_batch_{BATCH}")
    return {key: found[key] for key in keys if key in found}


def versions() -> dict[str, str]:
    """Of the peers."""
    found = {"llama-cpp-python": peer.version()}
    if python := _OPENVINO.value:
        found["openvino-genai"] = peer.version("openvino-genai", python=python)
    return found


def main(argv: Sequence[str]) -> None:
    del argv
    runs: dict[str, list[dict[str, float]]] = {}
    loads = []
    for _ in range(_ROUNDS.value):
        for name, options in OURS.items():
            loads.append(os.getloadavg()[0])
            runs.setdefault(name, []).append(ours(options))
        for form in LLAMA_CPP:
            found = theirs(PEER.value, "llama_cpp_speed.py", f"{form}.gguf", f"--batch={BATCH}")
            runs.setdefault(f"llama.cpp {form}", []).append(found)
        if python := _OPENVINO.value:
            for form in OPENVINO:
                found = theirs(python, "openvino_speed.py", f"openvino-{form}")
                runs.setdefault(f"OpenVINO {form}", []).append(found)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    ratios = {
        f"{mine} / {other}, {key}": medians[mine][key] / value
        for mine in OURS
        for other in medians.keys() - OURS.keys()
        for key, value in medians[other].items()
    }
    found = {"peers": versions(), "medians": medians, "ratios": ratios, "runs": runs, "loads_before": loads}
    record(_NAME.value, found)


if __name__ == "__main__":
    app.run(main)
