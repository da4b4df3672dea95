"""What the scheduler is asked for and what it answers: `Request` in, `Plan` out. Host only."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class Status(enum.Enum):
    """Where a request is."""

    WAITING = enum.auto()  # holds nothing
    RUNNING = enum.auto()  # holds a slot and pages
    PREEMPTED = enum.auto()  # not planned any more; waits again once its steps in flight are over
    ENDED = enum.auto()  # not planned any more; holds what it held until its steps in flight are over


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """One sequence on its way through the scheduler. The first six fields are the caller's, the rest only to read.

    Attributes:
      id: the caller's name for it.
      prompt: token ids, one at least.
      max_tokens: most tokens to generate; 0 for a forward over the prompt alone.
      priority: requests of a lower number go first.
      reuse: look for its prefix in the pages of others. Off where something is wanted of every position.
      stepwise: planned one step at a time, only once its last token is known: the host makes something of that for
        the next (a grammar's mask).

      status: where it is.
      tokens: the prompt, and the tokens generated as far as they are known.
      target: tokens to compute in all; the last one generated is never fed back.
      arrival: counts requests in the order they were added.
      slot: row of the device's state.
      computed: tokens whose keys and values are in pages once the steps planned so far are over.
      prefill: tokens that were known when it was admitted: those the host feeds.
      cached_tokens: of the prompt, found in pages when it was first admitted.
      reused: tokens found in pages when it was last admitted.
      preemptions: how often.
      in_flight: plans that include it and are not completed.
      chain: digests of its full pages.
      registered: leading pages that others may find.
    """

    id: int
    prompt: Sequence[int]
    max_tokens: int
    priority: int = 0
    reuse: bool = True
    stepwise: bool = False

    status: Status = dataclasses.field(default=Status.WAITING, init=False)
    tokens: list[int] = dataclasses.field(init=False, repr=False)
    target: int = dataclasses.field(init=False)
    arrival: int | None = dataclasses.field(default=None, init=False)
    slot: int | None = dataclasses.field(default=None, init=False)
    computed: int = dataclasses.field(default=0, init=False)
    prefill: int = dataclasses.field(default=0, init=False)
    cached_tokens: int = dataclasses.field(default=0, init=False)
    reused: int = dataclasses.field(default=0, init=False)
    preemptions: int = dataclasses.field(default=0, init=False)
    in_flight: int = dataclasses.field(default=0, init=False)
    chain: list[bytes] = dataclasses.field(default_factory=list, init=False, repr=False)
    registered: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.target = len(self.prompt) + max(self.max_tokens - 1, 0)

    @property
    def output(self) -> list[int]:
        """Tokens generated, as far as they are known."""
        return self.tokens[len(self.prompt) :]

    @property
    def left(self) -> int:
        """Tokens still to plan."""
        return self.target - self.computed

    @property
    def decoding(self) -> bool:
        """Whether its next token is one that the device sampled."""
        return self.computed >= self.prefill

    @property
    def held(self) -> bool:
        """Whether a step in flight must be over before it is planned again."""
        return self.stepwise and self.in_flight > 0

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the lower one."""
        assert self.arrival is not None, "requests are ordered once they are added"
        return self.priority, self.arrival


class Piece(NamedTuple):
    """What a plan does for one request.

    Attributes:
      request: whose.
      slot: row of the device's state.
      start: position of the first token.
      length: tokens fed at once.
      limit: most tokens that come of it: 0 for a chunk that is not the prompt's last; more than 1 where the dispatch
        takes several steps.
      decodes: its one token is what the slot sampled last. Otherwise the host feeds
        `request.tokens[start : start + length]`.
      begins: the first piece since the request was given its slot, so that the slot's state is to be set up.
    """

    request: Request
    slot: int
    start: int
    length: int
    limit: int
    decodes: bool
    begins: bool = False

    @property
    def samples(self) -> bool:
        """Whether its last token is sampled."""
        return self.limit > 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One dispatch. The device runs plans in the order they were made.

    Attributes:
      pieces: decodes, then chunks of prompts; each slot once.
      steps: of decoding, 1 or `SchedulerConfig.decode_steps`: a slot takes part in the first `limit` of them, and must
        not write to pages in the others.
      page_table: `[G, R, P]`, a snapshot that later plans leave alone; the same array as the plan before's where
        nothing changed. Entries that a piece neither reads nor writes are other slots' pages.
    """

    pieces: tuple[Piece, ...]
    steps: int
    page_table: Int32[np.ndarray, "G R P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metrics:
    """Counts at one moment, pages a kind; from `prefix_hit_tokens` on since the start.

    Attributes:
      programs: compiled, as an engine does.
      drafted, accepted: tokens that speculation verified, and those of them that were right.
      worked_s: seconds that the device was seen at work. What ended while the host was elsewhere does not count, so
        it may have stood idle for less than the rest.
    """

    waiting: int
    running: int
    pages_used: tuple[int, ...]
    pages_cached: tuple[int, ...]
    pages_free: tuple[int, ...]
    prefix_hit_tokens: int
    preemptions: int
    programs: int = 0
    drafted: int = 0
    accepted: int = 0
    worked_s: float = 0.0
