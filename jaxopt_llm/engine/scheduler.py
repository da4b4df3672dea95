"""Which requests take part in the next step: continuous batching over pages. Host only, and deterministic.

The device runs one plan while the host makes the next, so plans count tokens before their values are known:

    plan = scheduler.schedule()          # counts on
    ...                                  # dispatch it; then wait for the plan before
    scheduler.complete(before, tokens)   # values; corrects counts where fewer tokens came than planned
    scheduler.finish(request)            # a stop token or string, or nobody wants it: the caller decides

One rule keeps pages safe: what a request holds is given back only when no plan in flight includes it. `finish` and
preemption therefore only stop it from being planned (`Status`), and `_settle` gives back. Pages behind a window go
back by the same rule: when the last plan that reads them completes.

It cannot get stuck: the running request that goes first takes pages from the others, one at a time, until it has
what it needs; `add` refuses requests that do not fit alone.
"""

import bisect
import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

import numpy as np
from jaxtyping import Int32

from jaxopt_llm.engine.pages import PageTables, extend_chain
from jaxopt_llm.engine.plan import Metrics, Piece, Plan, Request, Status

_ORDER = attrgetter("order")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Sizes.

    Attributes:
      max_slots: requests that run at once, R.
      page_size: tokens a page.
      num_pages: pages of each kind of attention.
      windows: each kind's window, None for full attention; as `ModelConfig.window_kinds`.
      max_tokens_per_step: tokens fed in one step at most; longer prompts go in chunks.
      max_seq_len: most tokens of a sequence, prompt and output.
      decode_steps: steps a dispatch when every request decodes and none waits.
      stages: of a pipeline; a dispatch then takes one step, of a share of the requests that decode.
    """

    max_slots: int
    page_size: int
    num_pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    max_tokens_per_step: int
    max_seq_len: int
    decode_steps: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        for name in ("max_slots", "page_size", "max_seq_len", "decode_steps", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.windows or len(self.num_pages) != len(self.windows):
            raise ValueError(f"num_pages={self.num_pages} must have one entry for each of {self.windows=}")
        if min(self.num_pages) < 1 or any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"num_pages={self.num_pages} and windows={self.windows} must be at least 1 each")
        if self.max_tokens_per_step < self.max_slots:
            raise ValueError(
                f"max_tokens_per_step={self.max_tokens_per_step} must be at least max_slots={self.max_slots}, "
                "so that every slot can decode in every step"
            )
        if self.stages > 1 and self.decode_steps > 1:
            raise ValueError(
                f"decode_steps={self.decode_steps} must be 1 with stages={self.stages}: a stage has its next tokens "
                "from the last one"
            )

    @property
    def in_flight(self) -> int:
        """Plans in flight at most: one that each stage runs, and one that follows at once."""
        return self.stages + 1


class Scheduler:
    """Requests that wait and run, and what they hold."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self._tables = PageTables(
            num_pages=config.num_pages,
            windows=config.windows,
            page_size=config.page_size,
            max_slots=config.max_slots,
            max_seq_len=config.max_seq_len,
        )
        self._slots = list(range(config.max_slots))  # a heap: low ones first, so that few rows are in use
        self._waiting: list[Request] = []  # by `order`, as `_running`
        self._running: list[Request] = []
        self._leaving: list[Request] = []  # preempted or ended, with plans in flight
        self._in_flight: deque[Plan] = deque()
        self._arrivals = itertools.count()
        self._prefix_hit_tokens = self._preemptions = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to plan and nothing to complete."""
        return not (self._waiting or self._running or self._in_flight)

    @property
    def page_table(self) -> Int32[np.ndarray, "G R P"]:
        """As it is; read-only."""
        return self._tables.snapshot()

    @property
    def metrics(self) -> Metrics:
        pools = self._tables.pools
        return Metrics(
            waiting=len(self._waiting),
            running=len(self._running),
            pages_used=tuple(pool.used for pool in pools),
            pages_cached=tuple(pool.cached for pool in pools),
            pages_free=tuple(pool.free for pool in pools),
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._preemptions,
        )

    def add(self, request: Request) -> None:
        """Takes a request in.

        Raises:
          ValueError: as `check`.
        """
        self.check(request)
        request.arrival = next(self._arrivals)
        bisect.insort(self._waiting, request, key=_ORDER)

    def check(self, request: Request) -> None:
        """Reads nothing that ever changes, so that any thread may ask.

        Raises:
          ValueError: if it is empty, was added before, or could never run.
        """
        config, length = self.config, len(request.prompt)
        if request.arrival is not None:
            raise ValueError(f"request {request.id} was added before; make a new one")
        if not length or request.max_tokens < 0:
            raise ValueError(
                f"request {request.id} has {length} prompt tokens and max_tokens={request.max_tokens}; "
                "give at least one token, and no negative max_tokens"
            )
        if length + request.max_tokens > config.max_seq_len:
            raise ValueError(
                f"request {request.id} has {length} prompt tokens and max_tokens={request.max_tokens}, "
                f"together more than max_seq_len={config.max_seq_len}; shorten one of them"
            )
        for window, peak, count in zip(
            config.windows, self._tables.peak(request.target), config.num_pages, strict=True
        ):
            if peak > count:
                raise ValueError(
                    f"request {request.id} needs {peak} pages of {config.page_size} tokens ({window=}) and there are "
                    f"{count}; shorten its {length} prompt tokens or max_tokens={request.max_tokens}"
                )

    def known(self, request: Request) -> int:
        """Tokens of a request that it would find computed, were it to start now."""
        return self._tables.match(self._shareable(request)) * self.config.page_size

    def finish(self, request: Request) -> None:
        """Ends a request wherever it is; tokens of it in flight are dropped. Nothing happens if it has ended."""
        if request.arrival is None:
            raise ValueError(f"request {request.id} was never added")
        if request.status is Status.ENDED:
            return
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        else:
            self._leave(request)
        request.status = Status.ENDED
        self._settle(request)

    def fail(self, request: Request) -> None:
        """As `finish`; what is in its pages is not to be trusted, and not shared with later requests."""
        self.finish(request)
        self._tables.forget(request.chain)

    def forget_prefixes(self) -> None:
        """No page computed so far is shared with later requests: the weights have changed."""
        self._tables.forget()
        for request in self._running + self._leaving:
            request.registered = request.target  # more than it will have pages: what it holds is part old

    @property
    def steps(self) -> int:
        """How many steps the next dispatch may take: 1, unless all that run just decode and have the pages to go on.

        While others wait, no more than until the first that runs is through, whose slot and pages they may have.
        """
        ready = [request for request in self._running if request.left]
        if not all(request.decoding and not request.stepwise for request in ready):
            return 1
        several = self.config.decode_steps
        if self._waiting:
            soon = self._leaving or len(ready) < len(self._running) or self._fits(self._waiting[0])
            several = 1 if soon else min([several, *(request.left for request in ready)])
        ends = [(_slot(request), request.computed + min(several, request.left)) for request in ready]
        lacking = sum(self._tables.lacks(slot, end) for slot, end in ends)
        return several if lacking <= self._tables.available else 1

    def schedule(self, steps: int | None = None) -> Plan | None:
        """The next step's work; None where there is nothing, or nothing before a plan in flight completes.

        Args:
          steps: at most `self.steps`, the default; fewer where another data shard shares the dispatch.

        Raises:
          ValueError: with `SchedulerConfig.in_flight` plans in flight.
        """
        if len(self._in_flight) == self.config.in_flight:
            raise ValueError(f"{self.config.in_flight} plans are in flight; complete one first")
        steps = self.steps if steps is None else steps
        pieces = self._decodes(steps)
        prefills = self._prefills(self.config.max_tokens_per_step - sum(piece.length for piece in pieces))
        # Only now, as one step's pieces may not read each other's pages; the next plan runs after this one.
        for piece in prefills:
            self._register(piece.request, piece.start + piece.length)
        pieces += prefills
        if not pieces:
            return None
        steps = steps if any(piece.limit > 1 for piece in pieces) else 1
        plan = Plan(pieces=tuple(pieces), steps=steps, page_table=self._tables.snapshot())
        self._in_flight.append(plan)
        return plan

    def complete(self, plan: Plan, tokens: Sequence[Sequence[int]]) -> None:
        """Takes in what a plan gave. A request with `max_tokens` tokens ends.

        Args:
          plan: the oldest in flight.
          tokens: for each piece, the tokens that came of it: at most `limit`. Fewer where a stop token ended it:
            then `finish` it before the next plan that includes it completes.

        Raises:
          ValueError: if they do not belong to each other, or a request goes on past where it ended.
        """
        if not self._in_flight or plan is not self._in_flight[0]:
            raise ValueError("this plan is not the oldest in flight; complete plans in order")
        if len(tokens) != len(plan.pieces):
            raise ValueError(
                f"{len(tokens)} lists of tokens for {len(plan.pieces)} pieces; give one for each"
            )
        for piece, sampled in zip(plan.pieces, tokens, strict=True):
            _check(piece, sampled)
        self._in_flight.popleft()
        for piece, sampled in zip(plan.pieces, tokens, strict=True):
            piece.request.in_flight -= 1
            if piece.request.status is not Status.ENDED:
                self._record(piece, sampled)
            self._settle(piece.request)

    def _decodes(self, steps: int) -> list[Piece]:
        ready = [
            request for request in self._running if request.decoding and request.left and not request.held
        ]
        pieces: list[Piece] = []
        for request in self._turn(ready):
            room = self._room(request, request.computed + min(steps, request.left))
            if room:
                pieces.append(self._piece(request, 1, room))
        return pieces

    def _turn(self, ready: list[Request]) -> list[Request]:
        """A pipeline's micro-batch: as many of those that decode as keep every stage busy with some.

        Their latest tokens must have left the last stage by the time the first one starts. So nobody takes part who
        does in one of the plans that the other stages are at; of the rest those go first who have waited longest.
        """
        stages = self.config.stages
        if stages == 1:
            return ready
        latest = {piece.request: i for i, plan in enumerate(self._in_flight) for piece in plan.pieces}
        begun = max(0, len(self._in_flight) - stages + 1)
        free = [request for request in ready if latest.get(request, -1) < begun]
        share = min(-(-len(ready) // stages), -(-len(free) // (stages - len(self._in_flight) + begun)))
        first = set(sorted(free, key=lambda request: latest.get(request, -1))[:share])
        return [request for request in free if request in first]

    def _prefills(self, budget: int) -> list[Piece]:
        begun = [request for request in self._running if not request.decoding]
        requests = itertools.chain(begun, self._admissions())
        pieces: list[Piece] = []
        while budget > 0 and (request := next(requests, None)):
            length = self._room(request, min(request.prefill, request.computed + budget))
            if length:
                last = request.computed + length == request.prefill
                pieces.append(self._piece(request, length, int(last and request.max_tokens > 0)))
                budget -= length
        return pieces

    def _piece(self, request: Request, length: int, limit: int) -> Piece:
        decodes = request.decoding
        begins = request.computed == request.reused
        piece = Piece(request, _slot(request), request.computed, length, limit, decodes, begins)
        request.computed += limit if decodes else length
        request.in_flight += 1
        return piece

    def _admissions(self) -> Iterator[Request]:
        """Requests that start to run, strictly in order: nobody overtakes one that waits for a slot or pages."""
        while self._waiting and self._slots and self._admit(self._waiting[0]):
            yield self._waiting.pop(0)

    def _fits(self, request: Request) -> bool:
        """Whether it could start to run now."""
        return bool(self._slots) and self._tables.fits(self._shareable(request), len(request.tokens))

    def _shareable(self, request: Request) -> Sequence[bytes]:
        """The pages that it may find computed; not that of its last token, which must give logits."""
        page_size = self.config.page_size
        extend_chain(request.chain, request.tokens, page_size=page_size)
        return request.chain[: (len(request.tokens) - 1) // page_size if request.reuse else 0]

    def _admit(self, request: Request) -> bool:
        known, page_size = len(request.tokens), self.config.page_size
        hit = self._tables.admit(self._slots[0], self._shareable(request), known)
        if hit is None:
            return False
        request.slot = heapq.heappop(self._slots)
        request.status = Status.RUNNING
        request.registered, request.prefill = hit, known
        request.reused = request.computed = hit * page_size
        if not request.preemptions:
            request.cached_tokens = request.computed
        self._prefix_hit_tokens += request.computed
        bisect.insort(self._running, request, key=_ORDER)
        return True

    def _room(self, request: Request, tokens: int) -> int:
        """Takes pages for a request's first `tokens` tokens; how many of those to compute have room, 0 if it waits."""
        while request.status is Status.RUNNING:
            room = self._tables.grow(_slot(request), tokens) - request.computed
            if room > 0:
                return room
            if not self._make_room(request):
                break
        return 0

    def _make_room(self, request: Request) -> bool:
        """Preempts the last of those that run, if `request` goes before it and pages are not coming anyway."""
        coming = self._leaving or any(other.left == 0 for other in self._running)
        if coming or (self._tables.windowed and request.in_flight):
            return False  # steps in flight will give pages back: nobody needs to leave for now
        victim = self._running[-1]
        if victim is request:
            return False  # it keeps what it has and goes on when others end, or leaves when they need it
        self._preempt(victim)
        return True

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        request.status = Status.PREEMPTED
        request.preemptions += 1
        self._preemptions += 1
        self._settle(request)

    def _leave(self, request: Request) -> None:
        """Off the running ones; nothing is given back yet."""
        if request.status is Status.RUNNING:
            self._running.remove(request)
            self._leaving.append(request)

    def _settle(self, request: Request) -> None:
        """Gives back what a request holds that left, once no plan in flight includes it."""
        if request.slot is None or request.status is Status.RUNNING or request.in_flight:
            return
        self._leaving.remove(request)
        self._tables.release(request.slot)
        heapq.heappush(self._slots, request.slot)
        request.slot = None
        if request.status is Status.PREEMPTED:
            request.status = Status.WAITING
            request.computed = 0
            bisect.insort(self._waiting, request, key=_ORDER)

    def _record(self, piece: Piece, sampled: Sequence[int]) -> None:
        request = piece.request
        reached = piece.start + (len(sampled) if piece.decodes else piece.length)
        request.tokens.extend(sampled)
        if not request.in_flight:
            request.computed = reached
        self._register(request, reached)
        self._tables.advance(_slot(request), reached)
        if reached == request.target:
            self.finish(request)

    def _register(self, request: Request, tokens: int) -> None:
        """Lets the full pages of a request's first `tokens` tokens, whose values are known, be found."""
        full = tokens // self.config.page_size
        if full > request.registered:
            extend_chain(request.chain, request.tokens, page_size=self.config.page_size)
            self._tables.register(_slot(request), request.chain, request.registered, full)
            request.registered = full


def _slot(request: Request) -> int:
    assert request.slot is not None, "only what runs has a slot"
    return request.slot


def _check(piece: Piece, sampled: Sequence[int]) -> None:
    request = piece.request
    if len(sampled) > piece.limit:
        raise ValueError(f"request {request.id} got {len(sampled)} tokens and its limit was {piece.limit}")
    if request.status is Status.ENDED:
        return
    if piece.samples and not piece.decodes and not sampled:
        raise ValueError(f"request {request.id} got no token of its prompt to go on from; finish it first")
    known = piece.start + piece.length
    if sampled and known != len(request.tokens):
        raise ValueError(
            f"request {request.id} has {len(request.tokens)} tokens and was planned on from {known}: "
            "it ended early and was not finished; call finish"
        )
