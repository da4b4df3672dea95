"""What every way to round a model costs it, on weights that lie on no grid: WikiText-2's test split.

    python -m benchmarks.compression [--schemes=int8,int4_rtn,int4_gptq] [--windows=10]

The default model, made over by `benchmarks.off_grid`; windows of 1,024 tokens from `$JAXOPT_DATA`, float32, without
overlap. The methods that look at a text see 16 x 512 tokens of the train split; embedding and head are int8, one scale
a row. Writes benchmarks/results/compression.json scheme after scheme, those of earlier calls over as many windows kept;
the exit code is 1 where a figure is beyond its bound.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import app, flags

import jaxopt_llm as jo
from benchmarks.off_grid import off_grid
from benchmarks.record import data_folder, record, recorded
from jaxopt_llm import evaluate
from jaxopt_llm.calibrate import Method, calibration_ids
from jaxopt_llm.models import Transformer, num_bytes, num_params
from jaxopt_llm.quantize import AWQ, GPTQ, SmoothQuant, layerwise, mixed, quantize

Scheme = Callable[[Transformer, np.ndarray], Transformer]


def nearest(format: str) -> Scheme:
    return lambda model, ids: quantize(model, format, rules=[("^(embed|head)", "int8")])


def by(*methods: Method, rest: str | None = "int8") -> Scheme:
    return lambda model, ids: layerwise(model, ids, methods, rest=rest)


_UNIFORM = "int4_g32_min"
SCHEMES: dict[str, Scheme] = {
    "int8": nearest("int8"),
    "int8_g32": nearest("int8_g32"),
    "w8a8": nearest("w8a8"),
    "smoothquant": by(SmoothQuant()),
    "int4_rtn": nearest("int4_g64_zero"),
    "int4_awq": by(AWQ(format="int4_g64_zero")),
    "int4_gptq": by(GPTQ(format="int4_g64_zero")),
    "int4_awq_gptq": by(AWQ(format="int4_g64_zero", round=False), GPTQ(format="int4_g64_zero")),
    "int4_g32_min_rtn": nearest("int4_g32_min"),
    # Everything in one format of 5.0 bits, which a budget of as many is measured against.
    "uniform5_rtn": lambda model, ids: quantize(model, _UNIFORM),
    "uniform5_awq": by(AWQ(format=_UNIFORM), rest=_UNIFORM),
    "uniform5_gptq": by(GPTQ(format=_UNIFORM), rest=_UNIFORM),
    "uniform5_awq_gptq": by(AWQ(format=_UNIFORM, round=False), GPTQ(format=_UNIFORM), rest=_UNIFORM),
    "mixed5": lambda model, ids: mixed(by(AWQ(round=False), rest=None)(model, ids), ids, target_bits=5.0),
    "int3_rtn": nearest("int3_g64_zero"),
    "int3_awq_gptq": by(AWQ(format="int3_g64_zero", round=False), GPTQ(format="int3_g64_zero")),
}
_NAME = Path(__file__).stem
_SCHEMES = flags.DEFINE_list("schemes", list(SCHEMES), "Which to measure.")
_WINDOWS = flags.DEFINE_integer("windows", 10, "Windows to score.", lower_bound=2)
_REFERENCE = {  # the same methods in torch, ten windows
    "int8": 0.0073,
    "w8a8": 0.075,
    "int4_rtn": 0.642,
    "int4_g32_min_rtn": 0.515,
}
_AT_MOST = (  # a scheme's KL divergence as a share of another's
    ("smoothquant", 0.25, "w8a8"),
    ("int4_awq", 0.55, "int4_rtn"),
    ("int4_gptq", 0.60, "int4_rtn"),
    ("int4_awq_gptq", 0.45, "int4_rtn"),
    ("int8", 1.0, "int4_awq"),
    ("int8", 1.0, "int4_gptq"),
    ("int4_rtn", 1.0, "int3_rtn"),
    *(("mixed5", 1.0, f"uniform5_{method}") for method in ("rtn", "awq", "gptq", "awq_gptq")),
)
_INT8_G32 = 0.0033


def measure(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every scheme against the floats: all results so far, after each."""
    loaded, tokenizer = jo.load("smollm2-135m-instruct", dtype="float32")
    assert tokenizer
    folder = data_folder() / "wikitext"
    text = (folder / "wiki.test.raw").read_text(encoding="utf-8")[: _WINDOWS.value * 10_000]
    ids = tokenizer.encode(text, add_special=False)
    model = off_grid(loaded)
    train = (folder / "wiki.train.first1mb.noblank.raw").read_text(encoding="utf-8")
    seen = calibration_ids(model, tokenizer, train, sequences=16, length=512)
    sample = jnp.asarray(ids[:256])[None]
    before, after = loaded(sample), model(sample)
    moved = float((jnp.abs(after - before) / (1 + jnp.abs(before))).max())  # as allclose has it, rtol = atol
    earlier = recorded(_NAME)
    schemes = earlier["schemes"] if earlier and earlier["windows"] == _WINDOWS.value else {}
    reference = evaluate.Reference(model)
    for name in names:
        start = time.perf_counter()
        small = SCHEMES[name](model, seen)
        seconds = time.perf_counter() - start
        found = evaluate.compare(small, reference, ids, windows=_WINDOWS.value)
        schemes[name] = figures(small, found) | {"seconds": round(seconds)}
        print(name, schemes[name], file=sys.stderr, flush=True)
        yield {"off_grid_logits_moved": moved, "windows": _WINDOWS.value, "schemes": schemes}


def figures(small: Transformer, found: evaluate.Comparison) -> dict[str, Any]:
    return {
        "bits_per_parameter": 8 * num_bytes(small) / num_params(small),
        "float_perplexity": found.reference.perplexity,
        "perplexity": found.perplexity.perplexity,
        "kld_mean": found.kld_mean,
        "kld_stderr": found.kld_stderr,
        "same_top_p": found.same_top_p,
    }


def violations(results: Mapping[str, Any]) -> list[str]:
    kld = {name: found["kld_mean"] for name, found in results["schemes"].items()}
    broken = [
        f"{name}: KL divergence {kld[name]:.4g}, at most {share} times {other}'s {kld[other]:.4g}"
        for name, share, other in _AT_MOST
        if name in kld and other in kld and kld[name] > share * kld[other]
    ]
    broken += [
        f"{name}: KL divergence {kld[name]:.4g} where torch finds {reference}"
        for name, reference in _REFERENCE.items()
        if name in kld and abs(kld[name] / reference - 1) > 0.05
    ]
    if kld.get("int8_g32", 0) > _INT8_G32:
        broken.append(f"int8_g32: KL divergence {kld['int8_g32']:.4g}, at most {_INT8_G32}")
    if results["off_grid_logits_moved"] > 1e-4:
        broken.append(f"off the grid, logits moved by {results['off_grid_logits_moved']:.2g}, at most 1e-4")
    return broken


def main(argv: Sequence[str]) -> None:
    del argv
    broken: list[str] = []
    for results in measure(_SCHEMES.value):
        broken = violations(results)
        record(_NAME, results | {"beyond_bounds": broken})
    sys.exit(bool(broken))


if __name__ == "__main__":
    app.run(main)
