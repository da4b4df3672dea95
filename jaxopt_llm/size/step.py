"""How long one step of the engine takes on a slice of chips, term by term, and which term binds."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxopt_llm.size.efficiency import Efficiency
from jaxopt_llm.size.model import Share
from jaxopt_llm.size.topology import Topology


class Piece(NamedTuple):
    """Tokens of one sequence in a step: how many, and from which position on."""

    start: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds of a step. Weights are read while products run: the longer counts, and what it does not hide.

    Attributes:
      cache, weights: to read them from HBM.
      flops: of products and attention.
      links: of collectives.
      layers: what layers take beside.
      exposed: share of the shorter of weights and flops that comes on top of the longer.
    """

    cache: float
    weights: float
    flops: float
    links: float
    layers: float
    exposed: float = 0.0

    @property
    def seconds(self) -> float:
        shorter, longer = sorted((self.weights, self.flops))
        return self.cache + longer + self.exposed * shorter + self.links + self.layers

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        reads = self.weights >= self.flops
        memory = self.cache + (1.0 if reads else self.exposed) * self.weights
        products = (self.exposed if reads else 1.0) * self.flops
        parts = {"HBM bandwidth": memory, "FLOPs": products, "links": self.links, "overhead": self.layers}
        return max(parts, key=lambda name: parts[name])


def step(share: Share, topology: Topology, pieces: Sequence[Piece], efficiency: Efficiency) -> Terms:
    """One step over these pieces, on one data shard of the mesh.

    Args:
      share: of the model, on one device.
      topology: the slice that the mesh lies on.
      pieces: the shard's.
      efficiency: of the program.
    """
    chip, config = topology.chip, share.config
    bandwidth = chip.hbm_bandwidth / chip.devices
    whole = chip.bf16_flops / chip.devices
    rate = chip.int8_ops / chip.devices if share.integer and chip.int8_ops else whole
    tokens, rows = sum(piece.length for piece in pieces), len(pieces)
    products = tokens * share.token_flops + rows * share.row_flops
    attention = sum(share.attention_flops(*piece) for piece in pieces)
    cache = sum(share.context_bytes(piece.start + piece.length) for piece in pieces)
    reduced = share.layer_rows * topology.all_reduce_s(
        tokens * config.d_model * share.float_bytes, share.tensor, efficiency
    )
    joined = topology.all_gather_s(rows * config.vocab_size * 4, share.tensor, efficiency)
    return Terms(
        cache=cache / bandwidth / efficiency.cache,
        weights=share.read_bytes(tokens) / bandwidth / efficiency.weights,
        flops=products / rate / efficiency.flops + attention / whole / efficiency.attention,
        links=reduced + joined,
        layers=config.num_layers * efficiency.layer_s,
        exposed=efficiency.exposed,
    )


def decode(share: Share, topology: Topology, rows: int, context: int, efficiency: Efficiency) -> Terms:
    """A step of so many sequences that each have `context` tokens in the cache."""
    return step(share, topology, [Piece(context - 1, 1)] * rows, efficiency)


def prefill_s(
    share: Share, topology: Topology, tokens: int, chunk: int, efficiency: Efficiency, *, sequences: int = 1
) -> float:
    """Seconds to read so many prompts of so many tokens, in chunks of at most `chunk` tokens together."""
    together = max(1, chunk // tokens)
    alone = [Piece(start, min(chunk, tokens - start)) for start in range(0, tokens, chunk)]
    if together == 1:
        return sequences * sum(step(share, topology, [piece], efficiency).seconds for piece in alone)
    full, left = divmod(sequences, together)
    groups = [(full, together), (1, left)]
    return sum(
        times * step(share, topology, alone * count, efficiency).seconds
        for times, count in groups
        if times and count
    )
