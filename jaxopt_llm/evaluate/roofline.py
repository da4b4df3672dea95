"""Where a decode step spends its time: what its compiled program launches, reads and computes, against a machine."""

import collections
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxopt_llm.engine import EngineConfig, inputs
from jaxopt_llm.engine.ahead import compile_apart, compile_step
from jaxopt_llm.evaluate.program import Operation, operations
from jaxopt_llm.evaluate.timing import read_bandwidth
from jaxopt_llm.models import FUSIONS, Transformer
from jaxopt_llm.sharding.chips import Chip

SAMPLING = "sampling"  # the fusion of choosing a token with the step
OTHER = "other"  # what no named scope claims
_ALIKE = 0.1  # layers whose figures differ by less share a row
_ORDER = ("embed", "layers", "head", SAMPLING, OTHER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a roofline is made of.

    Attributes:
      name: of the chip or processor.
      bandwidth: bytes a second.
      flops: operations a second, a multiply-add being two.
      measured: here and now, rather than published.
    """

    name: str
    bandwidth: float
    flops: float
    measured: bool

    @classmethod
    def published(cls, chip: Chip) -> Self:
        """One device of a chip, its products in bfloat16."""
        return cls(
            name=chip.name,
            bandwidth=chip.hbm_bandwidth / chip.devices,
            flops=chip.bf16_flops / chip.devices,
            measured=False,
        )

    @classmethod
    def here(cls, dtype: jnp.dtype) -> Self:
        """The default device, measured in a few seconds; products of this dtype."""
        return cls(
            name=jax.devices()[0].device_kind,
            bandwidth=read_bandwidth(),
            flops=_product_rate(dtype),
            measured=True,
        )

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time that so much takes."""
        return max(nbytes / self.bandwidth, flops / self.flops)


def _product_rate(dtype: jnp.dtype) -> float:
    """Operations a second of a square product: the fastest of five."""
    width = 1024 if jax.default_backend() == "cpu" else 8192
    square = jnp.ones((width, width), dtype)
    multiply = jax.jit(lambda a: a @ a)
    times = []
    multiply(square).block_until_ready()
    for _ in range(5):
        start = time.perf_counter()
        multiply(square).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the step, or several layers' that are alike; each figure is of one of them.

    Attributes:
      name: such as `layers.*.attention`.
      count: how many there are.
      launched: operations.
      read, written: bytes of main memory.
      flops: of the matrix products.
      bound_s: the least time that the machine needs for one.
      share: of the step's bound that all of them take.
    """

    name: str
    count: int
    launched: float
    read: float
    written: float
    flops: float
    bound_s: float
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
    """What a fusion buys: the step with it and without it, all others in place.

    Attributes:
      name: of the fusion.
      launched, nbytes: operations, and bytes read and written.
      launched_without, nbytes_without: if it were left out.
    """

    name: str
    launched: int
    launched_without: int
    nbytes: int
    nbytes_without: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A decode step on a machine.

    Attributes:
      machine: whose roofline it is.
      rows, context: sequences that decode, and tokens of each in the cache.
      launched, read, written, flops: in total, as in `Part`.
      bound_s: the least time of a step, its parts one after another.
      tokens_per_s: of all rows together, at that.
      parts: in the order in which they run.
      fusions: each the engine applies.
      logit_bytes: that sampling in the step keeps inside.
      unknown: kernels whose operations nobody counts.
    """

    machine: Machine
    rows: int
    context: int
    launched: int
    read: int
    written: int
    flops: int
    bound_s: float
    tokens_per_s: float
    parts: list[Part]
    fusions: list[Fusion]
    logit_bytes: int
    unknown: list[str]


def decode_step(
    model: Transformer,
    machine: Machine,
    *,
    rows: int = 1,
    context: int = 1024,
    cache_dtype: str | None = None,
    fusions: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Step:
    """Compiles the engine's decode step, once as it is and once without each fusion, and reads the programs.

    Args:
      model: on one device, present or not; its parameters may be shapes.
      machine: that the bound is of.
      rows: sequences that decode together.
      context: tokens of each in the cache, all of which attention reads.
      cache_dtype: of keys and values, as in `EngineConfig`.
      fusions: whether to compile the step without each of them too.
      progress: called with (programs compiled, of all).

    Raises:
      ValueError: for rows or a context below 1, or a context beyond the model's.
    """
    if rows < 1:
        raise ValueError(f"{rows=} must be at least 1")
    config = EngineConfig(
        max_slots=rows,
        max_seq_len=context,
        cache_tokens=rows * context,  # so that a kernel's operands hold what it reads, and no more
        max_tokens_per_step=1,
        cache_dtype=cache_dtype,
    )
    shape = inputs.Shape(rows=rows, tokens=rows, steps=1, full=False)
    apart = [*sorted(FUSIONS, reverse=True), SAMPLING] if fusions else []
    report = progress or (lambda done, total: None)
    total = 1 + len(apart)
    report(0, total)
    found = _compiled(model, config, shape)
    report(1, total)
    without = {}
    for done, name in enumerate(apart, 2):
        without[name] = _compiled(model, config, shape, name)
        report(done, total)
    sums = _Sums.of(found)
    parts = _parts(found, machine)
    bound = sum(part.count * part.bound_s for part in parts)
    return Step(
        machine=machine,
        rows=rows,
        context=context,
        launched=sums.launched,
        read=sums.read,
        written=sums.written,
        flops=sums.flops,
        bound_s=bound,
        tokens_per_s=rows / bound,
        parts=parts,
        fusions=[_fusion(name, sums, _Sums.of(other)) for name, other in without.items()],
        logit_bytes=4 * rows * model.config.vocab_size,
        unknown=_unknown(found, sums.read),
    )


def _compiled(
    model: Transformer, config: EngineConfig, shape: inputs.Shape, without: str | None = None
) -> list[Operation]:
    """What runs, every fusion but one applied."""
    if without == SAMPLING:
        return [one for program in compile_apart(model, config, shape) for one in _read(program)]
    return _read(compile_step(model, config, shape, fuse=FUSIONS - {without}).compiled)


def _read(program: jax.stages.Compiled) -> list[Operation]:
    return operations(program.as_text() or "")


class _Sums(NamedTuple):
    """Of some operations."""

    launched: int
    read: int
    written: int
    flops: int

    @classmethod
    def of(cls, found: Sequence[Operation]) -> Self:
        return cls(
            sum(one.launched for one in found),
            sum(one.read for one in found),
            sum(one.written for one in found),
            sum(one.flops for one in found),
        )

    def like(self, other: "_Sums") -> bool:
        return all(abs(a - b) <= _ALIKE * max(a, b) + 64 for a, b in zip(self, other, strict=True))


def _fusion(name: str, fused: _Sums, apart: _Sums) -> Fusion:
    return Fusion(
        name=name,
        launched=fused.launched,
        launched_without=apart.launched,
        nbytes=fused.read + fused.written,
        nbytes_without=apart.read + apart.written,
    )


def _unknown(found: Sequence[Operation], read: int) -> list[str]:
    """Kernels that read much and whose products nobody counts."""
    sizes: collections.Counter[str] = collections.Counter()
    for one in found:
        if one.kernel and not one.flops:
            sizes[one.kernel] += one.read
    return sorted(name for name, size in sizes.items() if size > 0.01 * read)


def place_of(scope: str) -> tuple[str, int | None]:
    """The part that an operation belongs to, by the names of its scopes, and the layer; `other` if none claims it."""
    names = scope.split("/")
    for at, name in enumerate(names):
        if layer := re.fullmatch(r"layers\.(\d+)", name):
            inside = names[at + 1 : at + 2]
            return (inside[0] if inside in (["attention"], ["mlp"]) else "layer"), int(layer[1])
        if name in _ORDER:
            return name, None
    return OTHER, None


def _parts(found: Sequence[Operation], machine: Machine) -> list[Part]:
    """Layers that are alike together, each row's figures those of one."""
    places: dict[tuple[str, int | None], list[Operation]] = collections.defaultdict(list)
    for one in found:
        places[place_of(one.scope)].append(one)
    groups: list[tuple[str, list[int | None], list[_Sums]]] = []
    for (part, layer), inside in sorted(places.items(), key=lambda item: _order(*item[0])):
        sums = _Sums.of(inside)
        for name, layers, members in groups:
            if name == part and sums.like(members[0]):
                layers.append(layer)
                members.append(sums)
                break
        else:
            groups.append((part, [layer], [sums]))
    whole = {name: sum(len(layers) for part, layers, _ in groups if part == name) for name, *_ in groups}
    rows = []
    for part, layers, members in groups:
        read, written, flops = (
            statistics.fmean(getattr(each, what) for each in members) for what in ("read", "written", "flops")
        )
        rows.append(
            Part(
                name=_name(part, layers, whole[part]),
                count=len(members),
                launched=statistics.fmean(each.launched for each in members),
                read=read,
                written=written,
                flops=flops,
                bound_s=machine.seconds(read + written, flops),
                share=0.0,
            )
        )
    total = sum(row.count * row.bound_s for row in rows)
    return [dataclasses.replace(row, share=row.count * row.bound_s / total) for row in rows]


def _order(part: str, layer: int | None) -> tuple[int, str, int]:
    """In the order in which they run, layers by their parts."""
    return _ORDER.index("layers" if layer is not None else part), part, layer or 0


def _name(part: str, layers: Sequence[int | None], whole: int) -> str:
    """Such as `layers.*.mlp` for all, `layers.1-29.mlp` for some."""
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return part
    if len(numbers) == whole:
        return f"layers.*.{part}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layers.{','.join(spans)}.{part}"
