"""A mean over windows of a text, with its error."""

import dataclasses
import math
from typing import Self

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtrit

_CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure from windows of a text.

    Attributes:
      value: over all windows.
      stderr: its standard error, from how windows differ; None for one window.
      interval: where the figure of the whole source of such windows lies with 95 % confidence, by Student's t; None
        for one window.
    """

    value: float
    stderr: float | None
    interval: Interval | None

    @classmethod
    def ratio(cls, sums: Float[np.ndarray, "W"], sizes: Integer[np.ndarray, "W"]) -> Self:
        """The sum of a quantity over the sum of what it is counted in, tokens or bytes, from those of each window.

        Tokens of one window are no independent draws, windows nearly are, of unequal lengths: the error is that of
        a ratio estimated over clusters (Cochran, Sampling Techniques, 3rd edition, section 9A).
        """
        value, n = float(sums.sum() / sizes.sum()), len(sizes)
        if n == 1:
            return cls(value=value, stderr=None, interval=None)
        spread = np.square(sums - value * sizes).sum() * n / (n - 1)
        stderr = math.sqrt(spread) / float(sizes.sum())
        reach = float(stdtrit(n - 1, (1 + _CONFIDENCE) / 2)) * stderr
        return cls(value=value, stderr=stderr, interval=(value - reach, value + reach))

    def within(self, low: float, high: float) -> Self:
        """The interval cut to the values that the figure can have."""
        if self.interval is None:
            return self
        return dataclasses.replace(self, interval=(max(low, self.interval[0]), min(high, self.interval[1])))

    def exp(self) -> Self:
        """The exponential of the figure; its standard error to first order."""
        value = math.exp(self.value)
        if self.stderr is None or self.interval is None:
            return dataclasses.replace(self, value=value)
        low, high = self.interval
        return dataclasses.replace(
            self, value=value, stderr=value * self.stderr, interval=(math.exp(low), math.exp(high))
        )
