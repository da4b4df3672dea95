"""Prompt lookup against plain decoding on SmolLM2-135M: a task that copies, and four sets of prompts.

    python -m benchmarks.speculation [--prompts=6] [--tokens=160] [--rounds=3] [--quantize=int8_block]

Both engines run every prompt once a round, in turns; a prompt's time is the median over the rounds, and a
set's speed-up the ratio of its summed times a token. Tokens of the two must be equal. Reads the larger data (see
benchmarks/record.py) and writes benchmarks/results/speculation.json. Of 4 prompts of 128 tokens
each, two rounds take 80 seconds on two cores.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

import jaxopt_llm as jo
from benchmarks.record import data_folder, record
from jaxopt_llm.engine import Engine, EngineConfig, Result, SamplingParams

_PROMPTS = flags.DEFINE_integer("prompts", 6, "Prompts of each set.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 160, "Tokens that each prompt generates.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of the two engines.", lower_bound=1)
_QUANTIZE = flags.DEFINE_string("quantize", "int8_block", "Rounding of the weights.")

SETS = ("mt_bench", "humaneval", "gsm8k", "qa")
PASSAGE = 900  # characters of a text that is to be repeated


def prompts(count: int) -> dict[str, list[list[dict[str, str]]]]:
    """Messages by set."""
    data = data_folder()
    text = (data / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")
    passages = [text[start : start + PASSAGE] for start in range(2000, 2000 + count * 5000, 5000)]
    found = {"copy": [f"Repeat the following text word for word:\n\n{passage}" for passage in passages]}
    for name in SETS:
        lines = (data / "prompts" / f"eagle_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line)["turns"][0] for line in lines[:count]]
    return {name: [[{"role": "user", "content": text}] for text in texts] for name, texts in found.items()}


def measure(plain: Engine, lookup: Engine, asked: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
    """One set."""
    params = SamplingParams(max_tokens=_TOKENS.value, ignore_eos=True)
    before = lookup.metrics()
    times: dict[str, list[list[float]]] = {"plain": [], "lookup": []}
    equal = True
    for _ in range(_ROUNDS.value):
        found: dict[str, list[Result]] = {"plain": [], "lookup": []}
        for prompt in asked:
            for name, engine in (("plain", plain), ("lookup", lookup)):
                found[name] += engine.generate(prompt, params)
        for name, results in found.items():
            times[name].append([result.tpot_ms or 0.0 for result in results])
        equal &= [r.token_ids for r in found["plain"]] == [r.token_ids for r in found["lookup"]]
    typical = {
        name: [statistics.median(each) for each in zip(*runs, strict=True)] for name, runs in times.items()
    }
    after = lookup.metrics()
    return {
        "speedup": sum(typical["plain"]) / sum(typical["lookup"]),
        "each": [a / b for a, b in zip(typical["plain"], typical["lookup"], strict=True)],
        "tpot_ms": {name: statistics.mean(values) for name, values in typical.items()},
        "drafted": after.drafted - before.drafted,
        "accepted": after.accepted - before.accepted,
        "same_tokens": equal,
    }


def main(argv: Sequence[str]) -> None:
    del argv
    model, tokenizer = jo.load("smollm2-135m-instruct", quantize=_QUANTIZE.value)
    plain, lookup = (
        Engine(
            model,
            tokenizer,
            EngineConfig(max_slots=1, max_seq_len=1024, prefix_cache=False, prompt_lookup=looks),
        )
        for looks in (False, True)
    )
    for engine in (plain, lookup):
        engine.warm_up()
    results = {}
    for name, asked in prompts(_PROMPTS.value).items():
        results[name] = measure(plain, lookup, asked)
        print(name, json.dumps(results[name]), flush=True)
    record(Path(__file__).stem, results)


if __name__ == "__main__":
    app.run(main)
