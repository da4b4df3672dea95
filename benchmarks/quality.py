"""What rounding to nearest costs our default models, on the WikiText-2 test split.

    python -m benchmarks.quality [--model=smollm2-135m-instruct,gemma3-270m] [--windows=10]

Windows of 1,024 tokens from `$JAXOPT_DATA`, float32, without overlap; figures of the first four and of all. Gemma is
read with a BOS in place of each window's first token. Writes benchmarks/results/quality.json; the exit code is 1 where
a figure is beyond its bound. Sixteen minutes of processor time.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

import jaxopt_llm as jo
from benchmarks.record import data_folder, record
from jaxopt_llm import evaluate
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import num_bytes, num_params

_MODEL = flags.DEFINE_list("model", ["smollm2-135m-instruct", "gemma3-270m"], "Aliases or GGUF files.")
_WINDOWS = flags.DEFINE_integer("windows", 10, "Windows to score.", lower_bound=4)
_BOUNDS = {  # on the first four windows; perplexity as its share above float's, KL divergence in nats
    "int8": {"perplexity_change": 0.005, "bytes_per_parameter": 1.02},
    "int8_block": {"kld_mean": 0.0044, "bytes_per_parameter": 1.07},
    "native": {"kld_mean": 0.0031},  # 1.1 times what llama.cpp loses on SmolLM2's own Q4_1 file
}


def measure(name: str) -> dict[str, Any]:
    """Every format of one model, and its file's own blocks, against its floats."""
    model, tokenizer = jo.load(name, dtype="float32")
    assert tokenizer
    text = (data_folder() / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[: _WINDOWS.value * 10_000], add_special=False)
    bos = tokenizer.bos_id if model.config.family.startswith("gemma") else None
    formats = {}
    for format in (*FORMATS, "native"):
        small = jo.load(name, dtype="native")[0] if format == "native" else jo.quantize(model, format)
        found = evaluate.compare(small, model, ids, windows=_WINDOWS.value, bos=bos, tokenizer=tokenizer)
        formats[format] = {
            "bytes_per_parameter": num_bytes(small) / num_params(small),
            "first_4": figures(found, 4),
            f"first_{_WINDOWS.value}": figures(found, _WINDOWS.value)
            | {
                "kld_stderr": found.kld_stderr,
                "same_top_p": found.same_top_p,
                "bits_per_byte": found.perplexity.bits_per_byte,
            },
        }
    return {"parameters": num_params(model), "bos": bos, "formats": formats}


def figures(found: evaluate.Comparison, windows: int) -> dict[str, float]:
    """Of the first so many windows, which are of one length."""
    ours, floats = (
        math.exp(statistics.fmean(p.window_nll[:windows])) for p in (found.perplexity, found.reference)
    )
    return {
        "float_perplexity": floats,
        "perplexity": ours,
        "perplexity_change": ours / floats - 1,
        "kld_mean": statistics.fmean(found.window_kld[:windows]),
    }


def violations(name: str, result: dict[str, Any]) -> list[str]:
    broken = []
    for format, bounds in _BOUNDS.items():
        measured = result["formats"][format]
        flat = measured["first_4"] | {"bytes_per_parameter": measured["bytes_per_parameter"]}
        broken += [
            f"{name} {format}: {key}={flat[key]:.5g}, at most {bound}"
            for key, bound in bounds.items()
            if flat[key] > bound
        ]
    return broken


def main(argv: Sequence[str]) -> None:
    del argv
    results = {name: measure(name) for name in _MODEL.value}
    broken = [line for name, result in results.items() for line in violations(name, result)]
    record(Path(__file__).stem, {"models": results, "beyond_bounds": broken})
    sys.exit(bool(broken))


if __name__ == "__main__":
    app.run(main)
