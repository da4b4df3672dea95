"""Step times that `jaxopt-llm size` predicts, against tables that other projects published. Needs the models' configs.

    python -m benchmarks.size_published

Two programs, two sets of efficiency factors, each fitted to one table of its program and to nothing else:

- sglang-jax, a server (docs/cookbook/base/benchmarks/qwen3_benchmark.md and autoregressive/Llama/Llama3.1.md of
  sgl-project/sglang-jax): bfloat16 on a v6e-4; fitted to Qwen3-8B.
- jax-llm-examples, a loop without a server (llama3/README.md of jax-ml/jax-llm-examples): Llama-3.1-70B in int8 on a
  v5e-16; fitted to the table of 16 tensor shards.

Every figure and its error is printed. The exit code is 1 if one of the other tables is more than 25 % off, or if
`size.efficiency.SERVER` is not what the fit to sglang-jax gives. Writes benchmarks/results/size_published.json.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags
from scipy.optimize import least_squares

from benchmarks.record import record
from jaxopt_llm import checkpoints
from jaxopt_llm.cli import show
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size.efficiency import SERVER, Efficiency
from jaxopt_llm.size.model import Shapes, Share
from jaxopt_llm.size.step import decode, prefill_s
from jaxopt_llm.size.topology import Topology

_CONFIGS = flags.DEFINE_string(
    "configs", "../shared/model-configs", "Folder with a config.json for each model."
)
_LIMIT = 0.25

# input tokens, sequences, TTFT and ITL in ms; 1,024 output tokens
_QWEN3_8B = """
1024 8 117.55 5.99  | 1024 16 234.88 6.62   | 1024 32 469.26 8.18   | 1024 64 940.87 11.11
1024 128 1885.82 17.06 | 1024 256 3793.50 30.00 | 4096 8 523.78 6.61 | 4096 16 1057.61 9.00
4096 32 2139.54 13.48 | 4096 64 4108.43 21.13 | 4096 128 8369.21 33.68 | 4096 256 16892.56 33.78
8192 8 1202.65 7.98 | 8192 16 2431.33 11.48 | 8192 32 4876.89 19.22 | 8192 64 9797.87 31.98
8192 128 19583.63 31.88 | 8192 256 38895.87 31.87"""
_QWEN3_32B = """
1024 8 356.59 18.29 | 1024 16 715.11 19.16 | 1024 32 1429.91 22.17 | 1024 64 2864.06 29.48
1024 128 5732.96 34.05 | 1024 256 11500.61 34.27 | 4096 8 1557.02 19.88 | 4096 16 3145.14 22.45
4096 32 6364.04 34.42 | 4096 64 12329.34 35.32 | 4096 128 25060.27 35.32 | 4096 256 50766.15 35.34
8192 8 3510.68 21.85 | 8192 16 7105.47 26.94 | 8192 32 14355.59 33.45 | 8192 64 28849.51 33.43
8192 128 57299.20 33.41 | 8192 256 113927.80 33.38"""
# sequences and tokens a second of each, where the cache has room for 2,048 tokens of each
_TENSOR16 = "8 159 | 16 135 | 32 108 | 64 68.7 | 128 39.3"
_TENSOR8 = "8 84.4 | 16 80.2 | 32 74.5 | 64 58.4 | 128 50.2"
_OUTPUT, _CHUNK, _MEMORY = 1024, 2048, 0.8  # of sglang-jax: tokens, and its flags
# Tokens of each sequence in the cache of jax-llm-examples. A guess: it tells the room, not what it holds, and its
# prefill takes as long whatever the room.
_HELD = 512


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published figure, in ms, and what predicts it."""

    table: str
    what: str
    published: float
    predict: Callable[[Efficiency], float]


def main(_: Sequence[str]) -> None:
    tables = _sglang() | _examples()
    rows: list[dict[str, Any]] = []
    fits = {}
    for program, (fitted, *others) in _PROGRAMS.items():
        fits[program] = found = _fit(program, tables[fitted])
        for table in (fitted, *others):
            for figure in tables[table]:
                predicted = figure.predict(found)
                rows.append(
                    {
                        "program": program,
                        "table": table,
                        "what": figure.what,
                        "role": "fitted" if table == fitted else "predicted",
                        "published": figure.published,
                        "predicted": round(predicted, 3),
                        "error": round(predicted / figure.published - 1, 4),
                    }
                )
    missed = [row for row in rows if row["role"] == "predicted" and abs(row["error"]) > _LIMIT]
    worst = {table: max((row["error"] for row in rows if row["table"] == table), key=abs) for table in tables}
    record("size_published", {"factors": [vars(one) for one in fits.values()], "worst": worst, "rows": rows})
    show.table(
        list(rows[0]), [[*list(row.values())[:-1], f"{row['error']:+.1%}"] for row in rows], right=(4, 5, 6)
    )
    for one in fits.values():
        print(one)
    for row in missed:
        print(f"{row['table']}, {row['what']}: {row['error']:+.1%}", file=sys.stderr)
    same = _alike(fits["sglang-jax"], SERVER)
    if not same:
        print("size.efficiency.SERVER has other factors than the fit", file=sys.stderr)
    sys.exit(1 if missed or not same else 0)


# The table that a program's factors are fitted to, then those that they predict.
_PROGRAMS = {
    "sglang-jax": ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B"),
    "jax-llm-examples": ("tensor=16", "data=2,tensor=8"),
}
_FACTORS = ("cache", "flops", "attention", "links", "hop_s", "layer_s")
_START = (0.5, 0.5, 0.5, 0.8, 5e-7, 1e-5)
# No more of the products' rate than the best prefill that was published (73 %, arXiv:2604.15464), nor of HBM's than a
# copy reaches.
_BOUNDS = ((0.1, 0.1, 0.05, 0.1, 0.0, 0.0), (0.9, 0.75, 0.75, 1.0, 1e-6, 1e-3))


def _fit(name: str, figures: Sequence[Figure]) -> Efficiency:
    """The factors with the least squared errors of logarithms."""
    make = lambda values: Efficiency(name=name, **dict(zip(_FACTORS, map(float, values), strict=True)))
    errors = lambda values: [math.log(figure.predict(make(values)) / figure.published) for figure in figures]
    return make(least_squares(errors, _START, bounds=_BOUNDS, x_scale=_START).x)


def _alike(a: Efficiency, b: Efficiency) -> bool:
    return all(
        math.isclose(getattr(a, name), getattr(b, name), rel_tol=0.02, abs_tol=1e-6) for name in _FACTORS
    )


def _share(model: str, mesh: str, weights: str = "bf16", **changes: Any) -> Share:
    config, _ = checkpoints.read_config(f"{_CONFIGS.value}/{model}")
    shapes = Shapes.of(dataclasses.replace(config, **changes))
    return Share.of(shapes, MeshSpec.parse(mesh), weights)


def _numbers(text: str) -> Iterator[list[float]]:
    return (list(map(float, cell.split())) for cell in text.replace("\n", "|").split("|") if cell.strip())


def _sglang() -> dict[str, list[Figure]]:
    topology = Topology.parse(CHIPS["v6e"], "2x2")
    tables: dict[str, list[Figure]] = {}
    for model, table in (("Qwen3-8B", _QWEN3_8B), ("Qwen3-32B", _QWEN3_32B)):
        share, tables[model] = _share(model, "tensor=4"), []
        room = _MEMORY * topology.chip.hbm_bytes - share.weight_bytes
        for length, count, ttft, itl in _numbers(table):
            tokens, rows = int(length), int(count)
            fitting = min(rows, int(room / share.context_bytes(tokens + _OUTPUT)))
            # Equal lengths start and end together: what has no room waits until all the others are through.
            between = lambda e, s=share, t=tokens, r=fitting: (
                1e3 * decode(s, topology, r, t + _OUTPUT // 2, e).seconds
            )
            first = lambda e, s=share, t=tokens, r=rows: (
                1e3 * prefill_s(s, topology, t, _CHUNK, e, sequences=r)
            )
            tables[model] += [
                Figure(model, f"TTFT, {rows} x {tokens}", ttft, first),
                Figure(model, f"ITL, {rows} x {tokens}", itl, between),
            ]
    tables["Llama-3.1-8B"] = _llama(_share("Llama-3.1-8B", "tensor=4"), topology)
    return tables


def _llama(share: Share, topology: Topology) -> list[Figure]:
    """16 at once, of 1 to 512 tokens in and out: each waits for the prefill of those that come in place of others."""
    read, written, rows = 265, 258, 16
    step_s = lambda e: decode(share, topology, rows, read + written // 2, e).seconds
    prompt_s = lambda e: prefill_s(share, topology, read, _CHUNK, e)
    return [
        Figure(
            "Llama-3.1-8B", "TPOT, 16 x 265", 9.94, lambda e: 1e3 * (step_s(e) + rows * prompt_s(e) / written)
        ),
        Figure("Llama-3.1-8B", "TTFT, 16 x 265", 35.33, lambda e: 1e3 * (step_s(e) + prompt_s(e))),
    ]


def _examples() -> dict[str, list[Figure]]:
    topology = Topology.parse(CHIPS["v5e"], "4x4")
    tables = {}
    for mesh, table in (("tensor=16", _TENSOR16), ("data=2,tensor=8", _TENSOR8)):
        spec = MeshSpec.parse(mesh)
        # Theirs keeps a copy of a key/value head on two chips, as a model of 16 heads has it.
        share = _share("Llama-3.1-70B", mesh, "int8", num_kv_heads=max(8, spec.tensor))
        tables[mesh] = [
            Figure(
                mesh,
                f"step, {int(rows)} sequences",
                1e3 / rate,
                lambda e, s=share, r=int(rows) // spec.data: 1e3 * decode(s, topology, r, _HELD, e).seconds,
            )
            for rows, rate in _numbers(table)
        ]
    return tables


if __name__ == "__main__":
    app.run(main)
