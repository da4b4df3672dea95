"""Which chips serve a model under given traffic: what fits, latencies, tokens a second, what they cost and what binds.

Weights are not needed, a config is enough. Step times come from published figures of the chips, and from how much of
them a server reached on a v6e-4 (no GPU was compared with); a simulation of the engine's own scheduler gives
percentiles. Traffic is --rate requests a second, or --concurrency requests at once; lengths are --input_tokens and
--output_tokens on average, or those of a --trace in Azure's or Mooncake's form.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxopt_llm import checkpoints, configs
from jaxopt_llm import size as sizing
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import CHIP, CONCURRENCY, JSON, MESH, MODEL, OUTPUT_TOKENS
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.cli.writing import out_path
from jaxopt_llm.report import check_plot

TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The one slice to consider: 2x4 of TPUs, 8 of GPUs. Unset: all."
)
INPUT_TOKENS = flags.DEFINE_integer("input_tokens", None, "Mean length of prompts. Unset: 1024.")
SPREAD = flags.DEFINE_float(
    "spread", None, "Lengths differ from their mean by up to this share of it, evenly."
)
TRACE = flags.DEFINE_string("trace", None, "File of requests, in place of drawn lengths and times.")
RATE = flags.DEFINE_float(
    "rate", None, "Requests a second, at random times; of a trace, to stretch its times to."
)
REQUESTS = flags.DEFINE_integer("requests", 256, "Requests to simulate; the first of a trace.")
TTFT_MS = flags.DEFINE_float("ttft_ms", None, "Longest time to the first token.")
TPOT_MS = flags.DEFINE_float("tpot_ms", None, "Longest mean time between later tokens.")
LATENCY_MS = flags.DEFINE_float("latency_ms", None, "Longest time to the last token.")
PERCENTILE = flags.DEFINE_float("percentile", 95, "Of requests, that these times hold for.")
WEIGHTS = flags.DEFINE_list(
    "weights", ["bf16"], "Precisions to consider: bf16, or what --quantize takes elsewhere."
)
KV = flags.DEFINE_string("kv", "bf16", "Precision of keys and values: bf16 or int8.")
PRICE = flags.DEFINE_list("price", [], "US dollars for an hour of a chip, such as v5e=1.2,h100=2.5.")
PLOT = flags.DEFINE_string(
    "plot", None, "Where to draw cost against time between tokens: an .svg or .png file."
)
CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "File of runs from bench engine --append: efficiency factors are fitted to them, in place of a server's.",
)
WRITE = flags.DEFINE_string(
    "write",
    None,
    "New config file for the best candidate, such as configs/serving/mine.py: bench engine, generate and chat read it.",
)
AOT = flags.DEFINE_boolean(
    "aot",
    False,
    "Compile the engine's steps for the best candidates, at most three: the compiler tells memory and collectives, and "
    "whether it fits. TPUs need libtpu, GPUs JAX's CUDA plugin, no chip is needed.",
)
_SHOWN = 20
_DEFAULT_CHIPS = "v5e,v5p,v6e,a100,h100"


def main(argv: Sequence[str]) -> None:
    plot = None if PLOT.value is None else out_path(PLOT.value, marker=None, flag="plot")
    if plot is not None:
        check_plot("plot", plot)
    target = None if WRITE.value is None else _new_config(WRITE.value)
    names = sizing.chip_names((_DEFAULT_CHIPS if CHIP.value is None else CHIP.value).split(","))
    levels = sizing.Levels(
        ttft_ms=TTFT_MS.value, tpot_ms=TPOT_MS.value, latency_ms=LATENCY_MS.value, percentile=PERCENTILE.value
    )
    traffic = _traffic()
    runs = [] if CALIBRATE.value is None else sizing.settled(sizing.read_runs(Path(CALIBRATE.value)))
    left_out = sizing.held_out(runs)
    uncertainty = sizing.uncertainty(runs, left_out) if runs else sizing.UNCERTAINTY
    config, _ = checkpoints.read_config(MODEL.value)
    chips = sizing.chips_of(names, [run.chip for run in runs])
    ranked = sizing.sweep(
        config,
        traffic,
        chips=chips,
        topology=TOPOLOGY.value,
        mesh=MESH.value,
        weights=WEIGHTS.value,
        kv=KV.value,
        levels=levels,
        prices=_prices(PRICE.value),
        efficiency=sizing.fit(runs) if runs else sizing.SERVER,
    )
    if AOT.value:
        with stages("programs") as report:
            ranked = sizing.confirm(ranked, config, traffic, chips=chips, progress=report)
    if target is not None:
        serving = sizing.serving(ranked[0], MODEL.value, config, traffic)
        made = {"name": _name_of(target), "command": _command()}
        sizing.write(target, sizing.source(serving, ranked[0], traffic, **made))
    told = sizing.explanation(ranked, traffic_is_timed=traffic.rate is not None)
    if plot is not None:
        sizing.draw(ranked, plot)
    if JSON.value:
        plain = [
            dataclasses.asdict(one) | {name: _named(getattr(one, name)) for name in _NESTED} for one in ranked
        ]
        best = plain[0] if ranked[0].fits else None
        errors = [{"prefill": one.prefill, "tpot": one.step} for one in left_out]
        show.json_line(
            {
                "candidates": plain,
                "best": best,
                "explanation": told,
                "uncertainty": uncertainty,
                "held_out": errors,
                "written": target,
            }
        )
    else:
        _tell(ranked, told, uncertainty)
        if left_out:
            _tell_left_out(left_out)
        if target is not None:
            print(f"\nwritten to {target}: jaxopt-llm bench engine --config={_name_of(target)} runs it")


_NESTED = ("bytes_per_chip", "ttft_ms", "tpot_ms", "latency_ms")


def _named(value: sizing.Percentiles | sizing.Bytes | None) -> dict[str, float] | None:
    return None if value is None else value._asdict()


def _traffic() -> sizing.Traffic:
    lengths = (INPUT_TOKENS, OUTPUT_TOKENS, SPREAD)
    given = [f"--{holder.name}" for holder in lengths if holder.value is not None]
    if TRACE.value is not None and given:
        raise ValueError(f"{' and '.join(given)} would not be looked at: --trace has its own lengths")
    mean_input, mean_output, spread = (
        default if holder.value is None else holder.value
        for holder, default in zip(lengths, (1024, 256, 0.0), strict=True)
    )
    if not 0 <= spread < 1:
        raise ValueError(f"{spread=} must be at least 0 and less than 1")
    span = lambda mean: (round(mean * (1 - spread)), round(mean * (1 + spread)))
    untimed = RATE.value is None and TRACE.value is None
    return sizing.traffic(
        prompt=span(mean_input),
        output=span(mean_output),
        trace=TRACE.value,
        rate=RATE.value,
        concurrency=16 if CONCURRENCY.value is None and untimed else CONCURRENCY.value,
        requests=REQUESTS.value,
    )


def _new_config(given: str) -> Path:
    """Where to write the config: a file that is not there yet."""
    path = out_path(given, marker=None, flag="write")
    if path.suffix != ".py":
        raise ValueError(f"--write={given} must end in .py: configs are Python files")
    sizing.check_new(path)
    return path


def _name_of(path: Path) -> str:
    """What --config calls it: packaged configs go by their name."""
    packaged = path.resolve().parent.parent == configs.FOLDER.resolve()
    return path.stem if packaged else str(path)


def _command() -> str:
    """This command, with the flags that say what was asked."""
    holders = [one for one in globals().values() if isinstance(one, flags.FlagHolder)]
    given = [
        one.serialize()
        for one in sorted(holders, key=lambda one: one is not MODEL)
        if one.present and one is not JSON
    ]
    return shlex.join(["jaxopt-llm", "size", *given])


def _prices(items: Sequence[str]) -> dict[str, float]:
    prices = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            prices[sizing.chip_names([name])[0]] = float(value)
        except ValueError as error:
            raise ValueError(f"--price={item}: {error}") from None
    return prices


def _tell_left_out(left_out: Sequence[sizing.HeldOut]) -> None:
    columns = ("left out", "weights", "sequences", "prefill s", "error", "step ms", "error")
    rows = [
        (
            f"{one.run.config.family}, {one.run.config.num_layers} x {one.run.config.d_model}", one.run.weights,
            one.run.concurrency, f"{one.run.prefill_s:,.3f}", f"{one.prefill:+.0%}",
            f"{1e3 * one.run.step_s:,.2f}", f"{one.step:+.0%}",
        )
        for one in left_out
    ]  # fmt: skip
    print()
    show.table(columns, rows, right=(2, 3, 4, 5, 6))


def _tell(ranked: Sequence[sizing.Candidate], told: str, uncertainty: str) -> None:
    columns = (
        "chip", "topology", "mesh", "weights", "batch", "fits", "meets", "TTFT ms p50 / p95", "TPOT ms p50 / p95",
        "tokens/s", "$/Mtok", "binds",
    )  # fmt: skip
    rows = [
        (
            one.chip, one.topology, one.mesh, one.weights_dtype, one.batch, one.fits, one.meets,
            _pair(one.ttft_ms), _pair(one.tpot_ms), one.tokens_per_s and round(one.tokens_per_s),
            None if one.usd_per_mtok is None else f"{one.usd_per_mtok:,.2f}", one.bound,
        )
        for one in ranked[:_SHOWN]
    ]  # fmt: skip
    show.table(columns, rows, right=(4, 7, 8, 9, 10))
    if len(ranked) > _SHOWN:
        print(f"and {len(ranked) - _SHOWN} more: --json has them all")
    print(f"\n{told}")
    for one in ranked:
        if one.not_compiled:
            print(f"\n{one.chip} {one.topology} is not compiled for: {one.not_compiled}")
        if one.compiled:
            _tell_compiled(one, one.compiled)
    print(f"\n{uncertainty}")


def _tell_compiled(one: sizing.Candidate, found: sizing.Compiled) -> None:
    verdict = "fits" if found.fits else "does not fit"
    layers = ", ".join(map(str, found.layers))
    print(f"\n{one.chip} {one.topology} ({one.mesh}, {one.weights_dtype}) by its compiler: {verdict}")
    if found.refusal:
        print(found.refusal)
    gb = lambda nbytes: f"{nbytes / 1e9:,.3f}"
    rows = [
        (
            name, gb(program.weights), gb(program.cache), gb(program.temporaries),
            ", ".join(f"{c.count} {c.kind}, {c.nbytes:,} bytes" for c in program.collectives) or "none",
        )
        for name, program in (("decode", found.decode), ("prefill", found.prefill))
        if program
    ]  # fmt: skip
    if rows:
        columns = ("step", "weights, GB a chip", "cache, GB", "temporaries, GB", "collectives of a device")
        show.table(columns, rows, right=(1, 2, 3))
    print(f"{layers} layers compiled in {found.seconds:.0f} s", end="")
    print(
        ""
        if found.cache_tokens is None
        else f"; at most {found.cache_tokens:,} tokens of cache a data shard fit"
    )


def _pair(times: sizing.Percentiles | None) -> str | None:
    return None if times is None else f"{times.p50:,.1f} / {times.p95:,.1f}"
