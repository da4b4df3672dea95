"""Which slices of chips there are, how a mesh lies on one, and how long its collectives take.

Slices: Google Cloud's pages of each TPU version. Collectives: "How to Scale Your Model" (jax-ml.github.io/scaling-book,
chapters 2, 3 and 12): bytes over the links that carry them, and no less than the hops take.
"""

import dataclasses
import math
from typing import Self

import jax

from jaxopt_llm.sharding.chips import Chip
from jaxopt_llm.size.efficiency import Efficiency

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_HOST = ("1", "2", "4", "8")  # GPUs that one switch, or one board, connects
_KNOWN = {0: ("1",), 1: _HOST, 4: _FLAT, 6: _CUBIC}  # by the links of a chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips along each axis of a TPU's grid, or GPUs behind one switch."""

    chip: Chip
    axes: tuple[int, ...]

    @classmethod
    def parse(cls, chip: Chip, text: str) -> Self:
        """Reads `4x4`.

        Raises:
          ValueError: for a slice that this chip does not come in; lists those it does.
        """
        known = _KNOWN[chip.links]
        if text not in known:
            raise ValueError(f"there is no {chip.name} slice {text!r}; known are {', '.join(known)}")
        return cls(chip, tuple(map(int, text.split("x"))))

    @classmethod
    def all_of(cls, chip: Chip) -> list[Self]:
        """Every slice of a chip, small ones first."""
        return [cls.parse(chip, text) for text in _KNOWN[chip.links]]

    @property
    def chips(self) -> int:
        return math.prod(self.axes)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def platform(self) -> str:
        """As JAX calls it."""
        return {0: jax.default_backend(), 1: "gpu"}.get(self.chip.links, "tpu")

    def __str__(self) -> str:
        return "x".join(map(str, self.axes))

    def all_reduce_s(self, nbytes: float, shards: int, efficiency: Efficiency) -> float:
        """Seconds to sum an array of so many bytes over so many devices: it is scattered, then gathered."""
        return 2 * self.all_gather_s(nbytes, shards, efficiency)

    def all_gather_s(self, nbytes: float, shards: int, efficiency: Efficiency) -> float:
        """Seconds until each of so many devices has the whole of an array that lies in parts on them."""
        if shards == 1:
            return 0.0
        hops, bandwidth = self._ring(shards)
        return max(hops * efficiency.hop_s, nbytes * (shards - 1) / shards / (bandwidth * efficiency.links))

    def _ring(self, shards: int) -> tuple[int, float]:
        """Hops to the farthest of a group of devices, and the bandwidth at which each sends.

        The devices of one chip count as one: the way between them is short.
        """
        link = self.chip.link_bandwidth
        if self.chip.links == 1:
            return 1, link
        left, hops, bandwidth = -(-shards // self.chip.devices), 0, 0.0
        for size in reversed(self.axes):  # JAX lays the innermost axis of a mesh along the last ones
            length = math.gcd(left, size)
            left //= length
            if length > 1:
                wraps = length == size and self._wraps(size)
                hops += length // 2 if wraps else length - 1
                bandwidth += link * (2 if wraps else 1)
        return max(hops, 1), bandwidth or link

    def _wraps(self, size: int) -> bool:
        """Whether an axis closes to a ring: on v5e and v6e one of 16 does, else those of whole cubes of 4x4x4."""
        return size == 16 if self.chip.links == 4 else all(axis % 4 == 0 for axis in self.axes)
