"""What `test_hosts.py` runs in each of two processes: address, process, what to do, where to write."""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

import jaxopt_llm as jo
from jaxopt_llm.sharding import hosts

MODEL = Path(__file__).parents[1] / "data" / "stories107K.gguf"
SIZES = jo.EngineConfig(max_slots=2, max_seq_len=128, max_tokens_per_step=32, decode_steps=4)
PROMPTS = ["Once upon a time", "The dog was", "A cat", "Lily said that"]
MESHES = {
    "tensor=8": False,
    "stage=1+1,tensor=4": True,
    "data=2,tensor=4": True,
}  # and whether everything is asked there
PARAMS = [
    jo.SamplingParams(max_tokens=24),
    jo.SamplingParams(max_tokens=12, temperature=1.0, seed=3, logit_bias={300: 2.0}),
    jo.SamplingParams(max_tokens=40, stop=["play"], logprobs=2),
    jo.SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, seed=5),
]


def engine(mesh: str) -> jo.Engine:
    return jo.Engine(*jo.load(MODEL, mesh=mesh), SIZES)


def even(tokens):
    """Allows no odd token; after four of them anything."""
    return np.arange(512) % 2 == 0 if len(tokens) < 4 else None


def broken(tokens):
    raise KeyError("no grammar")


def alike(engine: jo.Engine, *, whole: bool) -> dict[str, object]:
    """What one program asks in every process; every kind of request if `whole`."""
    count = len(PROMPTS) if whole else 2
    prompts, params = PROMPTS[:count], PARAMS[:count] if whole else PARAMS[::3]
    engine.warm_up(prompt_tokens=8, rows=1)
    results = engine.generate(prompts, params)
    streams = [engine.submit(*asked) for asked in zip(prompts, params, strict=True)]
    pieces = ["".join(chunk.text for chunk in stream) for stream in reversed(streams)]
    found: dict[str, object] = {
        "tokens": [result.token_ids for result in results],
        "texts": [result.text for result in results],
        "streamed": pieces[::-1],
    }
    if whole:
        found["masked"] = engine.submit("Tom", PARAMS[0], allowed=even).result().token_ids
        found["scores"] = [score.logprobs.tolist() for score in engine.score(PROMPTS[:2])]
        found["embedded"] = engine.embed(PROMPTS[:2]).tolist()
    return found


def unseeded(engine: jo.Engine) -> list[list[int]]:
    """Seeds that are drawn; and two threads, which ask in an order of their own."""
    drawn = jo.SamplingParams(max_tokens=16, temperature=1.0)
    found = [result.token_ids for result in engine.generate(PROMPTS[:2], drawn)]
    kept: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        kept[prompt] = engine.submit(prompt, drawn).result().token_ids

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads if hosts.link().index else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return [*found, *(kept[prompt] for prompt in PROMPTS)]


def arrivals(engine: jo.Engine) -> dict[str, object]:
    """Requests of process 0 alone, at times of their own; the others follow."""
    first = engine.submit(PROMPTS[0], PARAMS[0])
    begun = next(first).text
    late: list[jo.Result] = []

    def ask() -> None:
        time.sleep(0.05)
        late.extend(engine.generate(PROMPTS[1:], PARAMS[1:]))

    thread = threading.Thread(target=ask)
    thread.start()
    dropped = engine.submit("Never", jo.SamplingParams(max_tokens=100, ignore_eos=True))
    next(dropped)
    dropped.cancel()
    rest = "".join(chunk.text for chunk in first)
    thread.join()
    masked = engine.submit("Tom", PARAMS[0], allowed=even).result()
    failed = engine.submit("Tom", PARAMS[0], allowed=broken).result()
    return {
        "texts": [begun + rest, *(result.text for result in late)],
        "masked": masked.token_ids,
        "failed": failed.error,
        "dropped": dropped.result().finish_reason,
    }


def main(address: str, index: int, part: str, out: str) -> None:
    with hosts.connect(address, 2, index, timeout_s=60):
        match part:
            case "tokens":
                found: dict[str, object] = {
                    mesh: alike(made := engine(mesh), whole=whole) for mesh, whole in MESHES.items()
                }
                found["unseeded"] = unseeded(made)
                if index == 0:
                    found["arrivals"] = arrivals(made)
                else:
                    made.follow()
                Path(out).write_text(json.dumps(found))
            case "stream":
                made = engine("tensor=8")
                while True:  # until it is killed
                    for chunk in made.submit("Once", jo.SamplingParams(max_tokens=64, ignore_eos=True)):
                        print(repr(chunk.text))
            case "sizes":
                sizes = jo.EngineConfig(max_slots=2 + index, max_seq_len=128)
                jo.Engine(*jo.load(MODEL, mesh="tensor=8"), sizes)
                time.sleep(30)
            case "divergent":
                made = engine("tensor=8")
                made.generate(PROMPTS[0], PARAMS[0])
                if index == 1:
                    made.generate(PROMPTS[0], PARAMS[0])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5])
