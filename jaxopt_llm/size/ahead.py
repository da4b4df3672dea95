"""The engine's own steps compiled for a slice that is not there: what the compiler says of memory and collectives.

Weights are shapes, nothing is loaded. A very deep model is compiled at three small counts of layers: where what is
measured grows by the same amount from each to the next (by a period of layers, where their kinds alternate), the rest
follows. What comes near the memory of a device is compiled whole, for the compiler to say whether it fits.
"""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.engine.ahead import Ahead, compile_step
from jaxopt_llm.engine.inputs import Shape
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.models import ModelConfig, abstract, place
from jaxopt_llm.sharding import MeshSpec, Sharding, topologies
from jaxopt_llm.size.model import FLOAT, float_of, rounding_of
from jaxopt_llm.size.topology import Topology

_WHOLE = 48  # layers up to which one program takes the compiler less time than three small ones
_NEAR = 0.9  # of a device's memory: from here on the compiler is asked
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
# `%name = bf16[16,4096]{1,0} all-reduce(...)`; one that only begins has a tuple of operand and result.
_COLLECTIVE = re.compile(rf" = (\(?[^=]*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step, and the bytes that each device has of their results."""

    kind: str
    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled step, on one chip: its devices together.

    Attributes:
      weights, cache: bytes of its arguments.
      temporaries: bytes beside these.
      collectives: of a step.
    """

    weights: int
    cache: int
    temporaries: int
    collectives: tuple[Collective, ...]

    @property
    def nbytes(self) -> int:
        return self.weights + self.cache + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of an engine on a slice.

    Attributes:
      fits: by its verdict, for every program.
      refusal: its message where it does not.
      decode, prefill: the programs; None where one that the verdict needs was refused.
      cache_tokens: the most, of all sequences of a data shard, that the pages can hold beside all else; None if it
        does not fit.
      layers: those that were compiled; one number where the whole model was.
      seconds: that the compiler took.
    """

    fits: bool
    refusal: str | None
    decode: Program | None
    prefill: Program | None
    cache_tokens: int | None
    layers: tuple[int, ...]
    seconds: float


def devices_of(place: Topology) -> list[jax.Device]:
    """The devices of a slice, to compile for.

    Raises:
      ModuleNotFoundError: if the compiler for them is not installed; says what to install.
      ValueError: if it knows no such slice.
    """
    chip = place.chip
    if chip.links == 0:  # the machine at hand
        return list(jax.devices()[:1])
    if place.platform == "gpu":
        return topologies.gpu(chip.name, place.chips)
    if place.chips == 1:  # of the host's four
        return topologies.tpu(chip.name, "2x2")[: place.devices]
    return topologies.tpu(chip.name, str(place))


def compile_ahead(
    config: ModelConfig,
    where: Topology,
    mesh: MeshSpec,
    engine: EngineConfig,
    *,
    devices: Sequence[jax.Device] | None = None,
    weights: str = FLOAT,
    progress: Callable[[int, int], None] | None = None,
) -> Compiled:
    """Compiles the decode step of all slots, and that of a whole chunk of prompts.

    Args:
      config: of the model.
      where: the slice.
      mesh: over all its devices.
      engine: sizes of a data shard.
      devices: of the slice, from `devices_of`; None to ask for them.
      weights: `bf16`, or a format that `--quantize` takes.
      progress: called with (programs compiled, of all, as far as that is known).

    Raises:
      ModuleNotFoundError, ValueError: as `devices_of`; for a mesh that does not divide the model.
    """
    built = mesh.build(devices_of(where) if devices is None else devices)
    rounding = rounding_of(weights, FLOAT)
    sizes = engine.scheduler(config)
    shapes = {
        "decode": Shape(sizes.max_slots, sizes.max_slots, engine.decode_steps, full=False),
        "prefill": Shape(sizes.max_slots, sizes.max_tokens_per_step, 1, full=False),
    }
    memory, parts = where.chip.hbm_bytes, where.chip.devices
    counts, began, compiled = _counts(config), time.perf_counter(), set()

    def program(name: str, layers: int) -> Program:
        part = _first(config, layers)
        model = place(abstract(part, float_of(where.platform), rounding), Sharding(built, part.units))
        found = _read(compile_step(model, engine, shapes[name]), parts)
        compiled.add((name, layers))
        if progress:
            progress(len(compiled), max(len(compiled), len(shapes) * len(counts)))
        return found

    programs: dict[str, Program] = {}
    refusal = None
    try:
        for name in shapes:
            some = [program(name, count) for count in counts]
            alike = len(some) == 1 or _grow_alike(some)
            programs[name] = _grown(some, counts, config.num_layers)
            if counts[-1] < config.num_layers and (not alike or programs[name].nbytes > _NEAR * memory):
                programs[name] = program(name, config.num_layers)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
    most = max((one.nbytes for one in programs.values()), default=0)
    if where.platform != "tpu" and most > memory:  # other compilers do not refuse
        refusal = f"a step needs {most:,} bytes of a chip's {memory:,}"
    spare = memory - max((one.weights + one.temporaries for one in programs.values()), default=memory)
    return Compiled(
        fits=refusal is None,
        refusal=refusal,
        decode=programs.get("decode"),
        prefill=programs.get("prefill"),
        cache_tokens=None if refusal else _tokens(config, sizes, programs["decode"].cache, spare),
        layers=tuple(sorted({layers for _, layers in compiled})),
        seconds=time.perf_counter() - began,
    )


def _counts(config: ModelConfig) -> tuple[int, ...]:
    """Layers to compile: three equally far apart, the last layers of each the same kind as the model's; or all."""
    layers = config.num_layers
    if layers <= _WHOLE:
        return (layers,)
    kinds = [(config.windows[i], config.has_experts(i)) for i in range(layers)]
    period = next(p for p in range(1, layers + 1) if all(kinds[i] == kinds[i % p] for i in range(layers)))
    first = period + layers % period
    first += period if first < 2 else 0
    counts = tuple(first + period * more for more in range(3))
    return counts if counts[-1] < layers else (layers,)


def _first(config: ModelConfig, layers: int) -> ModelConfig:
    """The model of its first layers."""
    experts = config.experts and dataclasses.replace(config.experts, layers=config.experts.layers[:layers])
    return dataclasses.replace(config, num_layers=layers, windows=config.windows[:layers], experts=experts)


def _read(ahead: Ahead, devices: int) -> Program:
    found: Any = ahead.compiled.memory_analysis()
    own = ahead.weight_bytes + ahead.cache_bytes
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Program(
        weights=devices * ahead.weight_bytes,
        cache=devices * ahead.cache_bytes,
        temporaries=devices * (held + found.temp_size_in_bytes - own),
        collectives=collectives(ahead.compiled.as_text() or ""),
    )


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, by kind; what a loop does counts once.

    Args:
      text: of the program, as XLA prints it.
    """
    counts: collections.Counter[str] = collections.Counter()
    nbytes: collections.Counter[str] = collections.Counter()
    for outputs, kind, begins in _COLLECTIVE.findall(text):
        arrays = [
            math.prod(map(int, filter(None, dims.split(",")))) * int(bits) // 8
            for _, bits, dims in _ARRAY.findall(outputs)
        ]
        # One that only begins has its operand before its result, but for sums, which are as large as what they sum.
        result = arrays[1:2] if begins and kind != "all-reduce" and len(arrays) > 1 else arrays
        counts[kind] += 1
        nbytes[kind] += sum(result)
    return tuple(Collective(kind, counts[kind], nbytes[kind]) for kind in sorted(counts))


def _grow_alike(programs: Sequence[Program]) -> bool:
    """Whether the third is as much more than the second as this one is more than the first."""
    one, two, three = map(_figures, programs)
    return all(
        three.get(key, 0) - two.get(key, 0) == two.get(key, 0) - one.get(key, 0) for key in one | two | three
    )


def _figures(program: Program) -> dict[tuple[str, str], int]:
    """All that is exactly as large as it must be: not temporaries, whose place the compiler finds anew each time."""
    found = {("weights", ""): program.weights, ("cache", ""): program.cache}
    for one in program.collectives:
        found |= {("count", one.kind): one.count, ("nbytes", one.kind): one.nbytes}
    return found


def _grown(programs: Sequence[Program], counts: Sequence[int], layers: int) -> Program:
    """The program of so many layers, from those of fewer."""
    if len(programs) == 1:
        return programs[0]
    first, last = programs[0], programs[-1]
    more = (layers - counts[-1]) / (counts[-1] - counts[0])
    line = lambda low, high: round(high + more * (high - low))
    before = {one.kind: one for one in first.collectives}
    none = Collective("", 0, 0)
    return Program(
        weights=line(first.weights, last.weights),
        cache=line(first.cache, last.cache),
        temporaries=max(last.temporaries, line(first.temporaries, last.temporaries)),
        collectives=tuple(
            Collective(
                one.kind,
                line(before.get(one.kind, none).count, one.count),
                line(before.get(one.kind, none).nbytes, one.nbytes),
            )
            for one in last.collectives
        ),
    )


def _tokens(config: ModelConfig, sizes: SchedulerConfig, cache: int, spare: int) -> int:
    """Tokens that the pages of layers without a window hold where the cache has so many bytes."""
    layers = collections.Counter(config.windows)
    pages = dict(zip(sizes.windows, sizes.num_pages, strict=True))
    each = cache / sum(pages[window] * count for window, count in layers.items())
    if None not in layers:
        return sizes.page_size * min(pages.values())
    behind = sum(pages[window] * count for window, count in layers.items() if window is not None)
    return max(0, int((spare / each - behind) / layers[None])) * sizes.page_size
