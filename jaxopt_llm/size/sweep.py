"""Which chips serve a model under given traffic: every slice and mesh, simulated, ranked, and explained."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.engine.plan import Plan
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import CHIPS, Chip
from jaxopt_llm.size.candidate import PAGE, Bytes, Candidate, Levels, Percentiles, engine_of, paged, rank
from jaxopt_llm.size.efficiency import ROOFLINE, SERVER, Efficiency
from jaxopt_llm.size.here import HERE, here
from jaxopt_llm.size.model import FLOAT, Shapes, Share, rounding_of
from jaxopt_llm.size.simulate import Served, simulate
from jaxopt_llm.size.step import Piece, decode, prefill_s, step
from jaxopt_llm.size.topology import Topology
from jaxopt_llm.size.traffic import Traffic

_MOST_SLOTS = 256
_CHUNK = EngineConfig.max_tokens_per_step
_SPAN = 8  # slices of up to so many times the chips of the smallest that fits
_HEADROOM = 0.95  # of memory: what a step needs beside weights and cache is a guess here


def chip_names(names: Sequence[str]) -> list[str]:
    """As `CHIPS` has them: `a100` is short for `a100-80`; `this` is the machine at hand.

    Raises:
      ValueError: for an unknown one; lists the known.
    """
    known = {name: name for name in (HERE, *CHIPS)} | {"a100": "a100-80"}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"chip {', '.join(unknown) or 'none'} is unknown; known are {HERE}, {', '.join(CHIPS)}"
        )
    return [known[name] for name in names]


def chips_of(names: Sequence[str], measured: Sequence[Chip] = ()) -> list[Chip]:
    """Chips by their names; `this` is measured, unless it is among those that have been.

    Raises:
      ValueError: for an unknown one; lists the known.
    """
    return [here(measured) if name == HERE else CHIPS[name] for name in chip_names(names)]


def sweep(
    config: ModelConfig,
    traffic: Traffic,
    *,
    chips: Sequence[Chip],
    topology: str | None = None,
    mesh: str | None = None,
    weights: Sequence[str] = (FLOAT,),
    kv: str = FLOAT,
    levels: Levels | None = None,
    prices: Mapping[str, float] | None = None,
    efficiency: Efficiency = SERVER,
) -> list[Candidate]:
    """Every slice and mesh, the best first.

    Args:
      config: of the model.
      traffic: to serve.
      chips: to consider.
      topology: the one slice to look at, such as `2x4`; of GPUs their number.
      mesh: the one mesh, such as `data=2,tensor=4`.
      weights: precisions to consider: `bf16`, or formats that `jo.quantize` has.
      kv: `bf16` or `int8`.
      levels: of service.
      prices: US dollars for an hour of a chip, by its name, in place of `Chip.price`.
      efficiency: of the program: published, or fitted to measured runs.

    Raises:
      ValueError: for a topology, mesh, precision or price that does not exist, for a mesh that does not divide the
        model or has other devices than the topology, and for requests beyond the model's context.
    """
    if traffic.longest > config.max_seq_len:
        raise ValueError(
            f"a request has {traffic.longest} tokens, more than the model's context of {config.max_seq_len}"
        )
    for form in weights:
        rounding_of(form, kv)
    if kv == "int8" and any(chip.links > 1 for chip in chips):
        raise ValueError(
            "kv=int8: the engine keeps no int8 keys and values on a TPU yet; take bf16, or name GPUs alone"
        )
    for name, given in (prices or {}).items():
        if name not in [chip.name for chip in chips]:
            raise ValueError(
                f"price {name}={given}: {name} is none of {', '.join(chip.name for chip in chips)}"
            )
        if not given > 0:
            raise ValueError(f"price {name}={given} must be more than 0")
    shapes, levels = Shapes.of(config), levels or Levels()
    found: list[Candidate] = []
    for chip in chips:
        price = (prices or {}).get(chip.name, chip.price or 0.0) or None
        for form in weights:
            found += _of_chip(shapes, traffic, chip, topology, mesh, form, kv, levels, price, efficiency)
    if not found:
        raise ValueError("no mesh of these chips divides the model; name --mesh to see why")
    return sorted(found, key=rank)


def _of_chip(
    shapes: Shapes,
    traffic: Traffic,
    chip: Chip,
    topology: str | None,
    mesh: str | None,
    weights: str,
    kv: str,
    levels: Levels,
    price: float | None,
    efficiency: Efficiency,
) -> Iterator[Candidate]:
    slices = Topology.all_of(chip) if topology is None else [Topology.parse(chip, topology)]
    smallest: int | None = None
    wanted = None if mesh is None else MeshSpec.parse(mesh)
    if wanted and topology is None:
        slices = [one for one in slices if one.devices == wanted.size]
    if wanted and not any(one.devices == wanted.size for one in slices):
        counts = ", ".join(f"{one} has {one.devices}" for one in (slices or Topology.all_of(chip)))
        raise ValueError(f"mesh {wanted} is of {wanted.size} devices, and {chip.name} {counts}")
    for place in slices:
        if smallest is not None and place.chips > _SPAN * smallest:
            break
        for spec in [wanted] if wanted else _meshes(place.devices, traffic):
            try:
                share = Share.of(shapes, spec, weights, kv, place.platform)
            except ValueError:
                if wanted:
                    raise
                continue  # the model does not divide so: other meshes may do
            candidate = evaluate(
                share,
                place,
                spec,
                traffic,
                levels=levels,
                price=price,
                names=(weights, kv),
                efficiency=efficiency,
            )
            if candidate.fits and smallest is None:
                smallest = place.chips
            yield candidate


def _meshes(devices: int, traffic: Traffic) -> Iterator[MeshSpec]:
    """Data times tensor; no more data shards than requests that run at once."""
    for tensor in (2**power for power in range(devices.bit_length())):
        data = devices // tensor
        if devices % tensor == 0 and data <= (traffic.concurrency or data):
            yield MeshSpec(data=data, tensor=tensor)


def evaluate(
    share: Share,
    place: Topology,
    mesh: MeshSpec,
    traffic: Traffic,
    *,
    levels: Levels,
    price: float | None,
    names: tuple[str, str],
    efficiency: Efficiency,
) -> Candidate:
    """One candidate: what fits, and a simulation of one of its data shards.

    Args:
      share: of the model, on one device.
      place: the slice.
      mesh: on it.
      traffic: of all data shards.
      levels: of service.
      price: of a chip and hour.
      names: of the precisions of weights and cache.
      efficiency: of the program.
    """
    mine = traffic.part(mesh.data)
    mean = math.ceil(traffic.prompt + traffic.output)
    memory = _HEADROOM * place.chip.hbm_bytes / place.chip.devices - share.weight_bytes
    most = min(_MOST_SLOTS, mine.concurrency or _MOST_SLOTS)
    spare = memory - share.temporary_bytes(most, _CHUNK)
    fits = _tokens(share, 1, spare) >= paged(traffic.longest)
    room = int(spare / share.context_bytes(paged(mean))) if fits else 0
    slots = _slots(share, place, min(most, max(room, 1)), mean, levels, efficiency)
    temporaries = share.temporary_bytes(slots, _CHUNK)
    kv_bytes = int(min(slots, room) * share.context_bytes(paged(mean)))
    candidate = Candidate(
        chip=place.chip.name,
        topology=str(place),
        chips=place.chips,
        mesh=str(mesh),
        weights_dtype=names[0],
        kv_dtype=names[1],
        max_batch=room * mesh.data,
        batch=slots * mesh.data if fits else 0,
        fits=fits,
        bytes_per_chip=Bytes(
            *(place.chip.devices * size for size in (share.weight_bytes, kv_bytes, temporaries))
        ),
    )
    if not fits:
        return candidate
    served = simulate(
        mine, _scheduler(share, slots, spare, traffic), lambda plan: _seconds(share, place, plan, efficiency)
    )
    middle = math.ceil(traffic.prompt + traffic.output / 2)
    capacity = mesh.data * _capacity(share, place, slots, traffic, middle, efficiency)
    rate = served.tokens_per_s * mesh.data
    asked = 0.0 if traffic.rate is None else traffic.rate * traffic.output
    inside = served.latency_s.sum() / (
        served.last.max() - served.asked.min()
    )  # requests at a time, on average
    running = min(slots, max(1, round(inside)))
    return dataclasses.replace(
        candidate,
        ttft_ms=_percentiles(served.ttft_s),
        tpot_ms=_percentiles(served.tpot_s),
        latency_ms=_percentiles(served.latency_s),
        least_tpot_ms=1e3 * decode(share, place, running, middle, ROOFLINE).seconds,
        tokens_per_s=rate,
        capacity=capacity,
        keeps_up=capacity >= asked,
        meets=capacity >= asked and _meets(served, levels),
        usd_per_mtok=None if price is None else price * place.chips / 3600 / rate * 1e6,
        bound="capacity"
        if room == slots <= inside
        else decode(share, place, running, middle, efficiency).bound,
    )


def _slots(
    share: Share, place: Topology, most: int, context: int, levels: Levels, efficiency: Efficiency
) -> int:
    """As many sequences as fit, or as the time between tokens allows."""
    if levels.tpot_ms is None:
        return most
    fast = lambda rows: (
        1e3 * decode(share, place, rows, context, efficiency).seconds <= (levels.tpot_ms or math.inf)
    )
    low, high = 1, most
    while low < high:  # the largest that is fast enough
        rows = (low + high + 1) // 2
        low, high = (rows, high) if fast(rows) else (low, rows - 1)
    return low


def _scheduler(share: Share, slots: int, spare: float, traffic: Traffic) -> SchedulerConfig:
    """Sizes of an engine that gives all spare memory to the cache."""
    config = share.config
    tokens = min(slots * paged(traffic.longest), max(PAGE, _tokens(share, slots, spare)))
    engine = dataclasses.replace(engine_of(config, traffic, slots), cache_tokens=tokens, page_size=PAGE)
    return engine.scheduler(config)


def _tokens(share: Share, slots: int, spare: float) -> int:
    """Tokens of cache that so many bytes hold; layers with a window need no more than all slots can see through it."""
    windows, layers = share.config.windows, spare / share.kv_bytes
    alike = layers / len(windows)
    full = windows.count(None)
    behind = sum(slots * (window + _CHUNK + 2 * PAGE) for window in windows if window)
    return max(0, int(max(alike, (layers - behind) / full if full else 0)))


def _seconds(share: Share, place: Topology, plan: Plan, efficiency: Efficiency) -> float:
    if plan.steps == 1:
        pieces = [Piece(piece.start, piece.length) for piece in plan.pieces]
        return step(share, place, pieces, efficiency).seconds
    middle = plan.steps // 2  # all steps as long as the middle one: they grow by a token each
    pieces = [Piece(piece.start + min(middle, piece.limit - 1), 1) for piece in plan.pieces]
    return plan.steps * step(share, place, pieces, efficiency).seconds


def _capacity(
    share: Share, place: Topology, slots: int, traffic: Traffic, middle: int, efficiency: Efficiency
) -> float:
    """Tokens a second that a data shard generates with all slots busy: each sequence is read once, and stepped."""
    stepping = traffic.output * decode(share, place, slots, middle, efficiency).seconds
    reading = prefill_s(share, place, math.ceil(traffic.prompt), _CHUNK, efficiency, sequences=slots)
    return slots * traffic.output / (stepping + reading)


def _percentiles(seconds: Float[np.ndarray, "n"]) -> Percentiles | None:
    if not len(seconds):
        return None
    return Percentiles(*(1e3 * float(np.percentile(seconds, q)) for q in (50, 95)))


def _meets(served: Served, levels: Levels) -> bool:
    limits = (
        (served.ttft_s, levels.ttft_ms),
        (served.tpot_s, levels.tpot_ms),
        (served.latency_s, levels.latency_ms),
    )
    return all(
        1e3 * float(np.percentile(seconds, levels.percentile)) <= limit
        for seconds, limit in limits
        if limit is not None and len(seconds)
    )
