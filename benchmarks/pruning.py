"""What pruning costs SmolLM2, and what it brings: perplexity and KL divergence, size and decode speed.

    python -m benchmarks.pruning [--windows=4] [--parts=structured,magnitude,wanda,sparsegpt,speed]

Structured: 70 % of the parameters outside the embedding, cut in several ways, the default with `reconstruct` too. Of a
sparse method: half of the weights, and 2:4, of the same function off the 4-bit grid (`benchmarks.off_grid`), head and
embedding dense. Speed: decode at the original shape and at the default's in turn, beside the bytes that a step reads.
Calibrated on 16 x 512 tokens of WikiText-2's train text, measured on windows of 1,024 tokens of its test text, both
from `$JAXOPT_DATA`, float32. Writes benchmarks/results/pruning.json, part after part, those of earlier calls kept; the
exit code is 1 where a figure is beyond its bound. Speed takes two minutes of two cores, every other part longer.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import app, flags
from flax import nnx

import jaxopt_llm as jo
from benchmarks.off_grid import off_grid
from benchmarks.record import data_folder, record, recorded
from jaxopt_llm import evaluate, prune
from jaxopt_llm.calibrate import calibration_ids
from jaxopt_llm.models import ModelConfig, Transformer, num_bytes, num_params, num_zeros

_NAME = Path(__file__).stem
_WINDOWS = flags.DEFINE_integer("windows", 4, "Windows to score; the bounds are of four.", lower_bound=2)
_PARTS = flags.DEFINE_list("parts", ["structured", "magnitude", "wanda", "sparsegpt", "speed"], "To measure.")
_TARGET = 0.7
_WAYS: tuple[tuple[prune.Axis, ...], ...] = (
    ("mlp", "heads"),
    ("mlp",),
    ("layers",),
    ("mlp", "heads", "embed"),
)
_BOUNDS = {  # perplexity; those of SparseGPT are Wanda's, times a factor
    ("magnitude", "0.5"): 1820.0 * 1.01,
    ("magnitude", "2:4"): 18850.0 * 1.01,
    ("wanda", "0.5"): 50.5,
    ("wanda", "2:4"): 175.0,
}
_OF_WANDA = {"0.5": 1.05, "2:4": 1.0}
_LEAST_SPEEDUP = 0.9  # of what the bytes of a step promise


def structured(model: Transformer, calibration: np.ndarray, test: Sequence[int]) -> list[dict[str, Any]]:
    """Every way to the same size, from one pass of scores."""
    scores = prune.importance(model, calibration)
    reference, rows = evaluate.Reference(model), []
    for axes in _WAYS:
        shape = prune.fit(model, _TARGET, axes=axes)
        kept = prune.choose(scores, model.config, shape)
        forms = {"cut": prune.cut(model, kept)}
        if axes == _WAYS[0]:
            forms["reconstructed"] = prune.reconstruct(model, kept, calibration)
        for form, small in forms.items():
            rows.append(
                {"axes": axes, "form": form, "shape": _sizes(small.config)}
                | {"body_params": prune.body_params(small) / prune.body_params(model)}
                | quality(small, reference, test)
            )
    return rows


def quality(small: Transformer, reference: evaluate.Reference, test: Sequence[int]) -> dict[str, float]:
    found = evaluate.compare(small, reference, test, windows=_WINDOWS.value)
    return {
        "float_perplexity": found.reference.perplexity,
        "perplexity": found.perplexity.perplexity,
        "kld_mean": found.kld_mean,
        "same_top_p": found.same_top_p,
    }


def sparse(
    method: prune.SparseMethod, model: Transformer, calibration: np.ndarray, test: Sequence[int]
) -> list[dict[str, Any]]:
    """Both patterns, of the model off the grid."""
    dense = off_grid(model)
    reference, rows = evaluate.Reference(dense), []
    for pattern in _OF_WANDA:
        small = prune.sparsify(dense, pattern, method, ids=calibration)
        zeros = {"zeros": num_zeros(small) / num_params(small), "bytes": num_bytes(small)}
        rows.append({"sparsity": pattern} | zeros | quality(small, reference, test))
        print(method, rows[-1], file=sys.stderr, flush=True)
    return rows


def speed(model: Transformer, rounds: int = 2) -> dict[str, float]:
    """Decode of one sequence, two shapes in turn: medians, their ratio, and that of the bytes of a step.

    The values of the weights do not matter, so the pruned shape has random ones.
    """
    sizes: Mapping[str, Any] = prune.fit(model, _TARGET, axes=_WAYS[0]).resolve(model.config)
    small = Transformer(dataclasses.replace(model.config, **sizes), dtype=model.dtype, rngs=nnx.Rngs(0))
    rates: dict[str, list[float]] = {"original": [], "pruned": []}
    for _ in range(rounds):
        for name, each in (("original", model), ("pruned", small)):
            found = evaluate.speed(each, prompt_tokens=128, output_tokens=32)
            rates[name].append(found.decode_tokens_per_s.median)
    old, new = (statistics.median(found) for found in rates.values())
    return {
        "decode_tokens_per_s_original": old,
        "decode_tokens_per_s": new,
        "speedup": new / old,
        "bytes_ratio": num_bytes(model) / num_bytes(small),
    }


def violations(results: dict[str, Any]) -> list[str]:
    """Of the parts that were measured."""
    found = {
        (method, row["sparsity"]): row["perplexity"]
        for method in get_args(prune.SparseMethod)
        for row in results.get(method, ())
    }
    bounds = _BOUNDS | {
        ("sparsegpt", pattern): found["wanda", pattern] * factor
        for pattern, factor in _OF_WANDA.items()
        if "wanda" in results
    }
    broken = [
        f"{' '.join(key)}: perplexity {found[key]:.2f}, at most {bound:.2f}"
        for key, bound in bounds.items()
        if key in found and found[key] > bound
    ]
    timed = results.get("speed")
    if timed and timed["speedup"] < _LEAST_SPEEDUP * timed["bytes_ratio"]:
        broken.append(
            f"decode {timed['speedup']:.2f} times as fast, at {timed['bytes_ratio']:.2f} times fewer bytes"
        )
    return broken


def _sizes(config: ModelConfig) -> dict[str, int]:
    names = ("d_model", "d_ff", "num_heads", "num_kv_heads", "num_layers")
    return {name: getattr(config, name) for name in names}


def main(argv: Sequence[str]) -> None:
    del argv
    model, tokenizer = jo.load("smollm2-135m-instruct", dtype="float32")
    assert tokenizer
    folder = data_folder() / "wikitext"
    train = (folder / "wiki.train.first1mb.noblank.raw").read_text(encoding="utf-8")
    text = (folder / "wiki.test.raw").read_text(encoding="utf-8")[: _WINDOWS.value * 10_000]
    test = tokenizer.encode(text, add_special=False)
    calibration = calibration_ids(model, tokenizer, train)
    measures: dict[str, Callable[[], Any]] = {
        "structured": lambda: structured(model, calibration, test),
        **{
            method: functools.partial(sparse, method, model, calibration, test)
            for method in get_args(prune.SparseMethod)
        },
        "speed": lambda: speed(model),
    }
    for part in _PARTS.value:
        found = measures[part]()
        results = earlier() | {part: found}
        broken = violations(results)
        record(_NAME, results | {"beyond_bounds": broken})
    sys.exit(bool(broken))


def earlier() -> dict[str, Any]:
    """What calls before this one have measured on as many windows."""
    results = recorded(_NAME)
    return results if results and results["windows"] == _WINDOWS.value else {"windows": _WINDOWS.value}


if __name__ == "__main__":
    app.run(main)
