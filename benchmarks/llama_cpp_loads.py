"""Exports models to GGUF, F16 and Q8_0, and holds llama.cpp's greedy text against ours.

    python -m benchmarks.llama_cpp_loads --peer=PYTHON [MODEL ...]

PYTHON is an interpreter with llama-cpp-python; MODEL anything that `jaxopt_llm.load` takes, or `pruned` for SmolLM2 at
the shape of the recipe prune70; if none is named, it and our two aliases. Both sides read the same file and continue a
few prompts. `agree`: continuations that are the same to the end. `gaps`: for the others, the gap between our two best
logits at the first token that differs; llama.cpp rounds activations to the type of the weights, which may turn over a
near tie. `logits`: the largest difference up to there, as a share of the largest logit. Prints a line a file, then one
JSON object, which it also writes into benchmarks/results/; the exit code is 1 if a gap is more than --tolerance. Takes
three minutes a model on two cores.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jaxopt_llm as jo
from benchmarks import peer
from benchmarks.record import record
from jaxopt_llm import checkpoints, prune
from jaxopt_llm.calibrate import calibration_ids
from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize import sample_text
from jaxopt_llm.text import Tokenizer

_STEPS = flags.DEFINE_integer("steps", 32, "Tokens of each continuation.", lower_bound=1)
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.5, "Gap of two logits that llama.cpp's rounding may turn over."
)

_MODELS = ("smollm2-135m-instruct", "gemma3-270m", "pruned")
_PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "import numpy as np\n",
)


def main(argv: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        files = [
            compare(source, dtype, Path(scratch))
            for source in argv[1:] or _MODELS
            for dtype in ("F16", "Q8_0")
        ]
    record(Path(__file__).stem, {"llama_cpp": peer.version(), "steps": _STEPS.value, "files": files})
    sys.exit(any(gap > _TOLERANCE.value for file in files for gap in file["gaps"]))


def compare(source: str, dtype: str, scratch: Path) -> dict[str, Any]:
    """How the two sides continue the prompts from the same exported file."""
    path = scratch / f"{dtype}.gguf"
    whole = pruned() if source == "pruned" else jo.load(source, dtype="float32")
    checkpoints.export_gguf(*whole, path, dtype=dtype)
    model, tokenizer = jo.load(path, dtype="float32")
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; name a model that has one")
    prompts = [tokenizer.encode(prompt) for prompt in _PROMPTS]
    theirs = ask_peer(path, prompts, scratch / "peer.npz")
    ours = jo.generate(model, None, prompts, temperature=0.0, max_tokens=_STEPS.value, ignore_eos=True)
    gaps, errors = [], []
    for i, (prompt, result) in enumerate(zip(prompts, ours, strict=True)):
        tokens = theirs[f"tokens_{i}"]
        common = int(np.cumprod(tokens == result.token_ids).sum())
        sequence = jnp.asarray([[*prompt, *result.token_ids[:-1]]])
        logits = np.asarray(model(sequence))[0, len(prompt) - 1 :][: common + 1]
        errors.append(np.abs(logits - theirs[f"logits_{i}"][: common + 1]).max() / np.abs(logits).max())
        if common < len(tokens):
            second, first = np.sort(logits[common])[-2:]
            gaps.append(round(float(first - second), 3))
    agree, worst = len(prompts) - len(gaps), round(float(max(errors)), 5)
    name = Path(source).name
    print(f"{name} {dtype}: {agree} of {len(prompts)} continuations agree, {gaps=}", file=sys.stderr)
    return {
        "model": name, "dtype": dtype, "prompts": len(prompts), "agree": agree, "gaps": gaps, "logits": worst
    }  # fmt: skip


@functools.cache
def pruned() -> tuple[Transformer, Tokenizer | None]:
    """70 % of the parameters outside the embedding, fitted to a short text."""
    model, tokenizer = jo.load("smollm2-135m-instruct", dtype="float32")
    ids = calibration_ids(model, tokenizer, sample_text(), sequences=4, length=256)
    kept = prune.choose(prune.importance(model, ids), model.config, prune.fit(model, 0.7))
    return prune.reconstruct(model, kept, ids), tokenizer


def ask_peer(path: Path, prompts: Sequence[Sequence[int]], out: Path) -> dict[str, np.ndarray]:
    peer.ask("llama_cpp_greedy.py", path, out, _STEPS.value, stdin=json.dumps(prompts))
    with np.load(out) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    app.run(main)
