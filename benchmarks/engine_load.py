"""How the engine bears load, on SmolLM2-135M: context and slots, many requests, a shared prefix, idle time.

    python -m benchmarks.engine_load [--quantize=int8_block] [--rounds=3]

- growth: time of a token against context (128 to 4,096, one slot) and against slots (1 to 32, context 128).
- batching: 64 requests of mixed lengths over 8 slots, against an ideal packing by the same step times: all prompts at
  the rate of a full step, and all later tokens at the rate of 8 slots.
- prefix: time to the first token of a prompt with 1,000 tokens that were seen before, against one that was not.
- idle: share of the time at 8 slots that the device stands, at most: what the host did not see it work.

Writes benchmarks/results/engine_load.json and .png. Run it on an idle machine.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import jaxopt_llm as jo
from benchmarks.record import record
from jaxopt_llm.engine import Engine, EngineConfig, Result, SamplingParams
from jaxopt_llm.models import Transformer

_QUANTIZE = flags.DEFINE_string("quantize", "int8_block", "Rounding of the weights.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each figure is measured.", lower_bound=1)

CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
SLOTS = (1, 2, 4, 8, 16, 32)
REQUESTS, TOGETHER, PREFIX = 64, 8, 1000


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40_000, length).tolist()


def typical(figure: Callable[[int], float]) -> float:
    """The median over the rounds."""
    return statistics.median(figure(round) for round in range(_ROUNDS.value))


def decode_ms(results: Sequence[Result]) -> float:
    """Time of a step while all of them decode."""
    start = max(result.token_ms[0] for result in results)
    times = [[at for at in result.token_ms if at >= start] for result in results]
    return statistics.mean((each[-1] - each[0]) / (len(each) - 1) for each in times)


def growth(model: Transformer) -> dict[str, dict[int, float]]:
    """Milliseconds a token of one sequence, and milliseconds a step over slots."""
    params = SamplingParams(max_tokens=33, ignore_eos=True)

    def at(slots: int, context: int) -> float:
        config = EngineConfig(max_slots=slots, max_seq_len=context + 40, prefix_cache=False)
        engine = Engine(model, None, config)
        engine.warm_up(prompt_tokens=context, rows=slots)
        engine.generate([ids(context, 0)], params)
        step = lambda round: decode_ms(
            engine.generate([ids(context, 9 * round + i) for i in range(slots)], params)
        )
        return typical(step)

    return {
        "step_ms_by_context": {context: at(1, context) for context in CONTEXTS},
        "step_ms_by_slots": {slots: at(slots, 128) for slots in SLOTS},
    }


def batching(model: Transformer) -> dict[str, float]:
    """Seconds for all requests, and the ideal."""
    rng = np.random.default_rng(1)
    lengths, outputs = rng.integers(16, 512, REQUESTS), rng.integers(16, 256, REQUESTS)
    prompts = [ids(length, seed) for seed, length in enumerate(lengths)]
    params = [SamplingParams(max_tokens=int(count), ignore_eos=True) for count in outputs]
    engine = Engine(model, None, EngineConfig(max_slots=TOGETHER, max_seq_len=1024, prefix_cache=False))
    engine.warm_up()

    def run(_: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - start

    def full_step(round: int) -> float:
        (result,) = engine.generate([ids(512, 1000 + round)], SamplingParams(max_tokens=1, ignore_eos=True))
        return result.ttft_ms / 1e3 / 512

    def full_decode(round: int) -> float:
        mixed = [ids(int(np.mean(lengths)), 2000 + 9 * round + i) for i in range(TOGETHER)]
        return decode_ms(engine.generate(mixed, SamplingParams(max_tokens=97, ignore_eos=True))) / 1e3

    of_token, of_step = typical(full_step), typical(full_decode)
    total = typical(run)
    ideal = of_token * float(lengths.sum()) + of_step * float(outputs.sum() - REQUESTS) / TOGETHER
    return {"seconds": total, "ideal_seconds": ideal, "ratio": total / ideal}


def prefix(model: Transformer) -> dict[str, float]:
    """Milliseconds to the first token."""
    engine = Engine(model, None, EngineConfig(max_slots=1, max_seq_len=2048))
    engine.warm_up()
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    first, again = [], []
    for round in range(_ROUNDS.value):
        shared = ids(PREFIX, 3000 + round)
        first.append(engine.generate([shared + ids(20, 1)], one)[0].ttft_ms)
        again.append(engine.generate([shared + ids(20, 2)], one)[0].ttft_ms)
    new, known = statistics.median(first), statistics.median(again)
    return {"ttft_ms_new": new, "ttft_ms_known": known, "ratio": new / known}


def idle(model: Transformer) -> dict[str, float]:
    """Share of the time that the device was not seen at work, from the first prompt to the last token."""
    engine = Engine(model, None, EngineConfig(max_slots=TOGETHER, max_seq_len=512, prefix_cache=False))
    engine.warm_up()
    params = SamplingParams(max_tokens=257, ignore_eos=True)

    def share(round: int) -> float:
        prompts = [ids(128, 4000 + 9 * round + i) for i in range(TOGETHER)]
        worked, start = engine.metrics().worked_s, time.perf_counter()
        engine.generate(prompts, params)
        return 1 - (engine.metrics().worked_s - worked) / (time.perf_counter() - start)

    return {"idle_share": typical(share)}


def plot(results: dict[str, Any], path: Path) -> None:
    """Time against context and slots, and total time against the ideal."""
    import matplotlib as mpl  # only here, and not a dependency of the package

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    contexts, slots = results["growth"]["step_ms_by_context"], results["growth"]["step_ms_by_slots"]
    axes[0].plot(list(contexts), list(contexts.values()), "o-")
    axes[0].set(xscale="log", xlabel="context, tokens", ylabel="ms a token", title="One sequence")
    axes[0].set_xticks(list(contexts), list(map(str, contexts)))
    axes[1].plot(list(slots), [count / ms * 1e3 for count, ms in slots.items()], "o-")
    axes[1].set(xscale="log", xlabel="slots", ylabel="tokens/s in all", title="Decode, context 128")
    axes[1].set_xticks(list(slots), list(map(str, slots)))
    batching = results["batching"]
    axes[2].bar(["64 requests", "ideal packing"], [batching["seconds"], batching["ideal_seconds"]])
    axes[2].set(ylabel="s", title=f"Continuous batching: {batching['ratio']:.2f} x ideal")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.minorticks_off()
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> None:
    del argv
    model, _ = jo.load("smollm2-135m-instruct", quantize=_QUANTIZE.value)
    results = {}
    for measure in (growth, batching, prefix, idle):
        results[measure.__name__] = measure(model)
        print(measure.__name__, results[measure.__name__], flush=True)
    record(Path(__file__).stem, results)
    plot(results, Path(__file__).parent / "results" / f"{Path(__file__).stem}.png")


if __name__ == "__main__":
    app.run(main)
