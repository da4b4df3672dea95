"""How many drafts pay: learned from how the drafts of each request did, and how long rounds took. Host only."""

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence

from jaxopt_llm.engine.speculative import Tally

# How often a draft is right if those before it are, before anything is known.
_LOOKED_UP = 0.6  # by prompt lookup
_MODELLED = 0.8  # by a draft model
_WEIGHT = 4.0  # of that belief, in drafts
_KEPT = 0.8  # of what was learned, a dispatch later
_MORE = 0.05  # of a round's time, what one more draft a row is believed to add
_RECENT = 15  # rounds' times that a median is taken of
_GAIN = 1.08  # what drafts must promise: times and rates are measured, and vary
_GAP = 64  # tokens that a draft model may have missed and still be asked


@dataclasses.dataclass(kw_only=True)
class Record:
    """How drafts did in one request, the latest counting most.

    Attributes:
      rounds: of decoding in which drafts were looked for.
      found: rounds that had drafts.
      tested, right: drafts.
      missed: tokens that the draft model has not seen.
    """

    rounds: float = 0.0
    found: float = 0.0
    tested: float = 0.0
    right: float = 0.0
    missed: int = 0

    def add(self, rounds: int, tally: Tally | None, row: int, *, drafts: int) -> None:
        """A dispatch.

        Args:
          rounds: that it took.
          tally: how drafts did; None if nothing was drafted.
          row: of the request.
          drafts: that the model was asked about at most.
        """
        self.missed += 0 if drafts else rounds
        if tally:
            looked = rounds if drafts else 1  # a dispatch without drafts looks once
            self.rounds = _KEPT * self.rounds + looked
            self.found = _KEPT * self.found + int(tally.found[row])
            self.tested = _KEPT * self.tested + int(tally.tested[row])
            self.right = _KEPT * self.right + int(tally.right[row])


class Drafting:
    """Which of a few numbers of drafts the next dispatch asks about.

    Args:
      most: drafts of a row, at most.
      model: whether a draft model makes them, which falls behind for good where it is not asked.

    Attributes:
      levels: the numbers there are programs for, 0 first.
    """

    def __init__(self, most: int, *, model: bool):
        self.levels = (0, most // 2, most) if most > 1 else (0, most)
        self._model = model
        self._times: dict[tuple[int, int], deque[float]] = {}

    def level(self, records: Sequence[Record], rows: int) -> int:
        """The one with the most tokens a second.

        Args:
          records: of the requests that take part.
          rows: that their program has room for.
        """
        if not self._times.get((rows, 0)):
            return 0  # to have something to compare with
        base = self._seconds(rows, 0)
        best, gain = 0, _GAIN
        for level in self.levels[1:]:
            tokens = sum(self._tokens(record, level) for record in records) / max(len(records), 1)
            if tokens * base / self._seconds(rows, level) > gain:
                best, gain = level, tokens * base / self._seconds(rows, level)
        return best

    def learn(self, rows: int, level: int, rounds: int, seconds: float) -> None:
        """Takes in how long a dispatch took."""
        if rounds:
            times = self._times.setdefault((rows, level), deque(maxlen=_RECENT))
            times.append(seconds / rounds)

    def _seconds(self, rows: int, level: int) -> float:
        """Of a round; where none was timed, what is believed."""
        if times := self._times.get((rows, level)):
            return statistics.median(times)
        return (1 + _MORE * level) * self._seconds(rows, 0)

    def _tokens(self, record: Record, level: int) -> float:
        """Of a round, expected."""
        if self._model and record.missed > _GAP:
            return 1.0
        belief = _MODELLED if self._model else _LOOKED_UP
        right = (record.right + _WEIGHT * belief) / (record.tested + _WEIGHT)
        found = 1.0 if self._model or not record.rounds else record.found / record.rounds
        return 1 + found * sum(right**i for i in range(1, level + 1))
