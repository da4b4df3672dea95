"""How many drafts pay: learned from what came of each request, and from how long rounds took. Host only."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

LONGEST, SHORTEST = 4, 2  # tokens that must have stood in the same order before, for prompt lookup

_MODELLED = (
    0.8  # how often a draft model's draft is believed right if those before it are, before anything is known
)
_WEIGHT = 4.0  # of that belief, in drafts
_KEPT = 0.8  # of what was learned of a draft model, a dispatch later
_KEPT_TOKEN = 0.95  # of what was learned of prompt lookup, a token later
_MORE = 0.1  # of a round's time, what one more draft a row is believed to add
_RECENT = 15  # rounds' times that a median is taken of
_OLD = 64  # dispatches after which times that were not renewed are forgotten: one may have been an accident
_GAIN = 1.03  # what drafts must promise: times and rates are measured, and vary
_GAP = 64  # tokens that a draft model may have missed and still be asked


class Asked(NamedTuple):
    """What a dispatch asked for one request.

    Attributes:
      drafts: of a round, at most.
      tested: drafts of which it is known whether they were right: up to the first wrong one of a round.
      right: those of them that were.
    """

    drafts: int
    tested: int
    right: int


class Gain(NamedTuple):
    """What a level promises in a request.

    Attributes:
      tokens: of a round.
      drafted: share of rounds that have drafts.
    """

    tokens: float
    drafted: float


class LookedUp:
    """What prompt lookup would have gained in a request so far.

    Its drafts follow from the tokens alone, so the host plays the rounds of each level over again, beside the device:
    nobody asks the model about drafts to find out that they are wrong.

    Args:
      prompt: of the request.
      levels: numbers of drafts.
    """

    def __init__(self, prompt: Sequence[int], levels: Sequence[int]):
        self._tokens: list[int] = []
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # where each run of tokens last ended, and what follows begins
        self._plays = {level: _Play() for level in levels}
        for token in prompt:
            self._see(token)

    def take(self, tokens: Sequence[int], _: Asked | None) -> None:
        """Takes in what came; how drafts did in it follows."""
        for token in tokens:
            right = [play.next(self._tokens, token) for play in self._plays.values()]
            draft = self._see(token)
            for (level, play), accepted in zip(self._plays.items(), right, strict=True):
                if not accepted:
                    play.start(draft, level)

    def gain(self, level: int) -> Gain:
        """Of rounds with at most so many drafts."""
        play = self._plays[level]
        return Gain(play.tokens / play.rounds, play.drafted / play.rounds) if play.rounds else Gain(1.0, 0.0)

    def _see(self, token: int) -> int | None:
        """Adds a token; where drafts of what comes after it begin."""
        self._tokens.append(token)
        end = len(self._tokens)
        draft = None
        for length in range(min(LONGEST, end), SHORTEST - 1, -1):
            run = tuple(self._tokens[-length:])
            if draft is None:
                draft = self._after.get(run)
            self._after[run] = end
        return draft


class _Play:
    """Rounds of one level over a request's tokens, and those of them that had drafts; counts fade with each token."""

    def __init__(self) -> None:
        self.tokens = self.rounds = self.drafted = 0.0
        self._draft, self._left = 0, 0

    def next(self, tokens: Sequence[int], token: int) -> bool:
        """Whether the token is a draft that was right, so that the round goes on."""
        self.tokens = _KEPT_TOKEN * self.tokens + 1
        self.rounds *= _KEPT_TOKEN
        self.drafted *= _KEPT_TOKEN
        right = self._left > 0 and tokens[self._draft] == token
        if right:
            self._draft, self._left = self._draft + 1, self._left - 1
        return right

    def start(self, draft: int | None, level: int) -> None:
        """The next round, whose drafts begin there."""
        self.rounds += 1
        self._draft, self._left = (0, 0) if draft is None else (draft, level)
        self.drafted += draft is not None


class Modelled:
    """How a draft model's drafts did in a request, the latest counting most."""

    def __init__(self) -> None:
        self._tested = self._right = 0.0
        self._missed = 0  # tokens that the draft model has not seen

    def take(self, tokens: Sequence[int], asked: Asked | None) -> None:
        """Takes in what came, and how drafts did in it; None where there could be none."""
        if asked is None:
            return  # of a program that feeds the draft model what it feeds the model
        self._missed += 0 if asked.drafts else len(tokens)
        self._tested = _KEPT * self._tested + asked.tested
        self._right = _KEPT * self._right + asked.right

    def gain(self, level: int) -> Gain:
        """As `LookedUp.gain`."""
        if self._missed > _GAP:
            return Gain(1.0, 1.0)
        right = (self._right + _WEIGHT * _MODELLED) / (self._tested + _WEIGHT)
        return Gain(sum(right**i for i in range(level + 1)), 1.0)


Record = LookedUp | Modelled


def levels(most: int) -> tuple[int, ...]:
    """The numbers of drafts that rounds have room for, 0 first."""
    return (0, most // 2, most) if most > 1 else (0, most)


class Drafting:
    """Which level of drafts the next dispatch asks about.

    Args:
      most: drafts of a row, at most.
      model: whether a draft model makes them, which falls behind for good where it is not asked.
    """

    def __init__(self, most: int, *, model: bool):
        self.levels = levels(most)
        self._model = model
        self._times: dict[tuple[int, int], deque[float]] = {}
        self._ages: dict[tuple[int, int], int] = {}  # of these: dispatches of as many rows since the latest

    def record(self, prompt: Sequence[int]) -> Record:
        """For a new request."""
        return Modelled() if self._model else LookedUp(prompt, self.levels[1:])

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
            gains = [record.gain(level) for record in records]
            plain = math.prod(1 - gain.drafted for gain in gains)  # a round is, where no row has drafts
            seconds = plain * base + (1 - plain) * self._seconds(rows, level)
            tokens = statistics.fmean(gain.tokens for gain in gains)
            if tokens * base / seconds > gain:
                best, gain = level, tokens * base / seconds
        return best

    def learn(self, rows: int, level: int, rounds: Sequence[int], seconds: float) -> None:
        """Takes in how long a dispatch took.

        Args:
          rows: of its program.
          level: that it asked for.
          rounds: without drafts, and with some.
          seconds: of all.
        """
        plain, drafted = rounds
        if drafted and not self._times.get((rows, 0)):
            return  # the two kinds cannot be told apart
        if drafted:
            base = self._seconds(rows, 0)
            seconds = max(seconds - plain * base, drafted * base)
        if plain or drafted:
            key = rows, level if drafted else 0
            self._times.setdefault(key, deque(maxlen=_RECENT)).append(seconds / (drafted or plain))
            self._ages[key] = -1
            self._forget(rows)

    def _forget(self, rows: int) -> None:
        for key in [key for key in self._times if key[0] == rows]:
            self._ages[key] += 1
            if self._ages[key] >= _OLD:
                del self._times[key]

    def _seconds(self, rows: int, level: int) -> float:
        """Of a round; where none was timed, what is believed."""
        if times := self._times.get((rows, level)):
            return statistics.median(times)
        return (1 + _MORE * level) * self._seconds(rows, 0)
