"""What is ranked: chips, what they do with the traffic, and the engine that serves it there."""

import dataclasses
import math
from typing import NamedTuple

from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.size.ahead import Compiled
from jaxopt_llm.size.model import FLOAT
from jaxopt_llm.size.traffic import Traffic

PAGE = 128  # more than the engine's 16, so that the simulation takes less time: a sequence loses half a page


class Percentiles(NamedTuple):
    p50: float
    p95: float


class Bytes(NamedTuple):
    """On one chip, the devices of a chip together."""

    weights: int
    kv: int
    temporaries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """What service must reach, in ms at a percentile; None for what does not matter."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    latency_ms: float | None = None
    percentile: float = 95

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name}={value} must be more than 0")
        if self.percentile > 100:
            raise ValueError(f"percentile={self.percentile} must be at most 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Chips, and what they do with the traffic; the figures of service are None where the model does not fit.

    Attributes:
      chip, topology, chips, mesh: where it runs.
      weights_dtype, kv_dtype: precision.
      max_batch: sequences of the traffic's mean length that fit, on all data shards.
      batch: sequences that run at once at most, on all data shards.
      fits: whether weights, cache of the longest sequence and temporaries do, on each device.
      bytes_per_chip: with the cache that `batch` mean sequences take.
      ttft_ms, tpot_ms, latency_ms: to the first token, between tokens, to the last.
      least_tpot_ms: what a step takes by published figures alone.
      tokens_per_s: generated, under this traffic.
      capacity: tokens a second that it could generate with every slot in use.
      keeps_up: whether that is as much as the traffic asks for.
      meets: whether it keeps up and reaches the levels.
      usd_per_mtok: for a million generated tokens, under this traffic; None without a price.
      bound: what binds a decode step, or `capacity` where memory for the cache keeps sequences waiting.
      compiled: what the compiler says of it, and then `fits` is its verdict; None where it was not asked, or is not
        there: `not_compiled` says so.
    """

    chip: str
    topology: str
    chips: int
    mesh: str
    weights_dtype: str
    kv_dtype: str
    max_batch: int
    batch: int
    fits: bool
    bytes_per_chip: Bytes
    ttft_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    latency_ms: Percentiles | None = None
    least_tpot_ms: float | None = None
    tokens_per_s: float | None = None
    capacity: float | None = None
    keeps_up: bool = False
    meets: bool = False
    usd_per_mtok: float | None = None
    bound: str = "capacity"
    compiled: Compiled | None = None
    not_compiled: str | None = None


def rank(candidate: Candidate) -> tuple[bool, bool, bool, float, float, int]:
    """What meets the levels first, then what costs least; what has no price by tokens a second and chip."""
    each = (candidate.tokens_per_s or 0.0) / candidate.chips
    price = candidate.usd_per_mtok
    return (
        not candidate.fits,
        not candidate.meets,
        price is None,
        math.inf if price is None else price,
        -each,
        candidate.chips,
    )


def engine_of(config: ModelConfig, traffic: Traffic, slots: int, kv: str = FLOAT) -> EngineConfig:
    """The engine of a data shard: room for so many sequences of the traffic's mean length, and for its longest.

    Args:
      config: of the model.
      traffic: that it serves.
      slots: sequences that run together.
      kv: precision of keys and values, as `size` names it.
    """
    longest, mean = paged(traffic.longest), paged(math.ceil(traffic.prompt + traffic.output))
    return EngineConfig(
        max_slots=slots,
        max_seq_len=min(config.max_seq_len, longest),
        cache_tokens=max(longest, slots * mean),
        cache_dtype=None if kv == FLOAT else kv,
    )


def paged(tokens: int) -> int:
    """Tokens of the pages that so many tokens lie in."""
    return -(-tokens // PAGE) * PAGE
