"""A device made of dictionaries: it runs the scheduler's plans and checks every token that a query would read.

The "model" is a checksum of everything before a token, and a cell of a page holds exactly that: all the tokens up to
its own. So a wrong page, a page reused too early or a token fed twice cannot go unseen.
"""

import dataclasses
import random
import zlib
from collections import deque

from jaxopt_llm.engine.pages import PageTables
from jaxopt_llm.engine.plan import Piece, Plan, Request, Status
from jaxopt_llm.engine.scheduler import Scheduler, SchedulerConfig

VOCAB = 4
STOP = 0


def next_token(tokens):
    return zlib.crc32(repr(tuple(tokens)).encode()) // 7 % VOCAB


def prompt_of(length, seed=0):
    return random.Random(seed).choices(range(VOCAB), k=length)


def shape(plan):
    """(request's id, start, length, limit) of each piece."""
    return [(p.request.id, p.start, p.length, p.limit) for p in plan.pieces]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one position of a page holds: made of which weights, after which tokens."""

    weights: int
    tokens: tuple[int, ...]


@dataclasses.dataclass
class Known:
    """What is known of a request beforehand.

    Attributes:
      truth: the prompt and `max_tokens` tokens more, were it never to stop.
      expected: what it must give.
      stops: whether the token `STOP` ends it.
      weights: those that were there when it was admitted last.
    """

    truth: tuple[int, ...]
    expected: list[int]
    stops: bool
    weights: int = 0

    @classmethod
    def of(cls, request: Request, stops: bool) -> "Known":
        tokens = list(request.prompt)
        for _ in range(request.max_tokens):
            tokens.append(next_token(tokens))
        output = tokens[len(request.prompt) :]
        if stops and STOP in output:
            output = output[: output.index(STOP) + 1]
        return cls(tuple(tokens), output, stops)


@dataclasses.dataclass
class Dispatch:
    """A plan on its way: what the host fed when it was made, and the device's answer once it has run."""

    plan: Plan
    fed: list[list[int]]
    result: list[list[int]] | None = None


class Loop:
    """Scheduler, device and caller."""

    def __init__(self, **settings):
        defaults = {"max_slots": 4, "page_size": 4, "num_pages": (64,), "windows": (None,)}
        defaults |= {"max_tokens_per_step": 64, "max_seq_len": 64}
        self.config = SchedulerConfig(**defaults | settings)
        self.scheduler = Scheduler(self.config)
        self.known: dict[Request, Known] = {}
        self.cancelled: set[Request] = set()
        self.in_flight: deque[Dispatch] = deque()
        self.cells: dict[tuple[int, int, int], Cell | None] = {}
        self.last: dict[int, int] = {}  # of each slot, the token sampled last; None once it has stopped
        self.weights = 0

    @property
    def tables(self) -> PageTables:
        return self.scheduler._tables

    def add(self, prompt, max_tokens, *, stops=False, **settings) -> Request:
        request = Request(id=len(self.known), prompt=prompt, max_tokens=max_tokens, **settings)
        self.scheduler.add(request)
        self.known[request] = Known.of(request, stops)
        return request

    def cancel(self, request: Request) -> None:
        if request.status is not Status.ENDED:
            self.cancelled.add(request)
        self.scheduler.finish(request)

    def update_weights(self) -> None:
        self.scheduler.forget_prefixes()
        self.weights += 1

    def schedule(self) -> Plan | None:
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight or self.scheduler.idle, "nothing in flight, and yet nothing to do"
            return None
        for piece in plan.pieces:
            if piece.begins:
                self.known[piece.request].weights = self.weights
        self._check_plan(plan)
        fed = [p.request.tokens[p.start : p.start + p.length] if not p.decodes else [] for p in plan.pieces]
        self.in_flight.append(Dispatch(plan, fed))
        return plan

    def complete(self) -> Plan:
        self.run_device()
        dispatch = self.in_flight.popleft()
        assert dispatch.result is not None
        self.scheduler.complete(dispatch.plan, dispatch.result)
        for piece, sampled in zip(dispatch.plan.pieces, dispatch.result, strict=True):
            if self.known[piece.request].stops and STOP in sampled:
                self.scheduler.finish(piece.request)
        return dispatch.plan

    def step(self) -> Plan | None:
        """A plan, made and completed; what was in flight is over first."""
        while self.in_flight:
            self.complete()
        plan = self.schedule()
        if plan is not None:
            self.complete()
        return plan

    def drain(self, *, ahead: int = 2) -> int:
        """Runs to the end with up to so many plans in flight; the number of plans that it took."""
        requests = [request for request in self.known if request.status is not Status.ENDED]
        bound = 20 + 8 * sum(request.target + 1 for request in requests)
        plans = 0
        while not self.scheduler.idle:
            while len(self.in_flight) < ahead and self.schedule() is not None:
                plans += 1
            self.check()
            if self.in_flight:
                self.complete()
            assert plans < bound, "somebody starves"
        self.check_end()
        return plans

    def run_device(self) -> None:
        """The oldest plan that has not run."""
        for dispatch in self.in_flight:
            if dispatch.result is None:
                pieces = zip(dispatch.plan.pieces, dispatch.fed, strict=True)
                dispatch.result = [self._run(dispatch.plan, piece, fed) for piece, fed in pieces]
                return

    def _run(self, plan: Plan, piece: Piece, fed: list[int]) -> list[int]:
        truth, stops = self.known[piece.request].truth, self.known[piece.request].stops
        if piece.begins:
            self.last.pop(piece.slot, None)
        if not piece.decodes:
            assert tuple(fed) == truth[piece.start : piece.start + piece.length]
            self._feed(plan, piece, piece.start, fed)
            return self._sample(piece, truth, piece.start + piece.length) if piece.samples else []
        if stops and self.last[piece.slot] == STOP:  # the host does not know yet that it has stopped
            for kind in range(len(self.config.windows)):
                self.cells[self._place(plan, kind, piece.slot, piece.start)] = None
            return [random.Random(piece.start).randrange(VOCAB)] * piece.limit
        sampled: list[int] = []
        while len(sampled) < piece.limit and not (stops and STOP in sampled):
            position = piece.start + len(sampled)
            self._feed(plan, piece, position, [self.last[piece.slot]])
            sampled += self._sample(piece, truth, position + 1)
        return sampled

    def _sample(self, piece: Piece, truth: tuple[int, ...], position: int) -> list[int]:
        self.last[piece.slot] = truth[position]
        return [truth[position]]

    def _feed(self, plan: Plan, piece: Piece, start: int, tokens: list[int]) -> None:
        """Writes tokens into pages, then reads all that each of them sees."""
        known = self.known[piece.request]
        assert tokens[0] == known.truth[start], "fed another token than was sampled"
        sequence = known.truth[:start] + tuple(tokens)
        for kind, window in enumerate(self.config.windows):
            for position in range(start, len(sequence)):
                cell = Cell(self.weights, sequence[: position + 1])
                self.cells[self._place(plan, kind, piece.slot, position)] = cell
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, len(sequence)):
                cell = self.cells[self._place(plan, kind, piece.slot, position)]
                assert cell is not None, "reads what was never its own"
                assert cell.tokens == sequence[: position + 1]
                assert cell.weights >= known.weights, "reads what older weights wrote"

    def _place(self, plan: Plan, kind: int, slot: int, position: int) -> tuple[int, int, int]:
        size = self.config.page_size
        return kind, int(plan.page_table[kind, slot, position // size]), position % size

    def _check_plan(self, plan: Plan) -> None:
        config = self.config
        assert sum(piece.length for piece in plan.pieces) <= config.max_tokens_per_step
        assert len({piece.slot for piece in plan.pieces}) == len(plan.pieces)
        assert 1 <= plan.steps <= config.decode_steps
        assert plan.steps == 1 or all(piece.decodes for piece in plan.pieces)
        if self.scheduler._waiting and plan.steps > 1:
            assert not self.scheduler._fits(self.scheduler._waiting[0]), "one that waits could run"
            assert {piece.limit for piece in plan.pieces} == {plan.steps}, "a slot would stand empty"
        elif plan.steps > 1:
            assert plan.steps == config.decode_steps
        decodes = [piece.decodes for piece in plan.pieces]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        for piece in plan.pieces:
            assert piece.request.status in (Status.RUNNING, Status.PREEMPTED)
            assert piece.length >= 1 and piece.limit <= plan.steps
            assert not piece.decodes or piece.length == 1
            assert not (piece.decodes and piece.request.stepwise) or piece.request.in_flight == 1
            assert piece.start + max(piece.length, piece.limit) <= piece.request.target
            if piece.decodes:
                recent = [*self.in_flight][max(0, len(self.in_flight) - config.stages + 1) :]
                others = {its.request for other in recent for its in other.plan.pieces}
                assert piece.request not in others, "its token is on the way"
            self._check_writes(plan, piece)

    def _check_writes(self, plan: Plan, piece: Piece) -> None:
        """It writes to pages that are its own alone, and that no plan in flight touches for another."""
        last = piece.start + max(piece.length, piece.limit) - 1
        for kind, pool in enumerate(self.tables.pools):
            held = self.tables.held(kind, piece.slot)
            for index in range(piece.start // self.config.page_size, last // self.config.page_size + 1):
                page = int(plan.page_table[kind, piece.slot, index])
                assert page in held and pool.holders(page) == 1
                for other in self.in_flight:
                    assert page not in self._touched(other.plan, kind, but=piece.request)

    def _touched(self, plan: Plan, kind: int, *, but: Request) -> set[int]:
        """Pages that a plan reads or writes for all requests but one."""
        pages: set[int] = set()
        window, size = self.config.windows[kind], self.config.page_size
        for piece in plan.pieces:
            if piece.request is not but:
                first = 0 if window is None else max(0, piece.start - window + 1) // size
                last = (piece.start + max(piece.length, piece.limit) - 1) // size
                pages.update(plan.page_table[kind, piece.slot, first : last + 1].tolist())
        return pages

    def check(self) -> None:
        """After every call."""
        owners = {request.slot: request for request in self.known if request.slot is not None}
        assert len(owners) + len(self.scheduler._slots) == self.config.max_slots
        for kind, pool in enumerate(self.tables.pools):
            assert pool.free + pool.cached + pool.used == pool.num_pages
            places: dict[int, list[tuple[Request, int]]] = {}
            for slot in range(self.config.max_slots):
                pages = self.tables.held(kind, slot)
                assert not pages or slot in owners, "a slot without a request holds pages"
                first = self.tables._first[kind][slot]
                for index, page in enumerate(pages, first):
                    places.setdefault(page, []).append((owners[slot], index))
            for page in range(pool.num_pages):
                assert pool.holders(page) == len(places.get(page, []))
            for shared in places.values():
                self._check_equal(shared)
        for request, known in self.known.items():
            assert tuple(request.tokens) == known.truth[: len(request.tokens)]
            assert 0 <= request.in_flight <= len(self.in_flight)
            assert (request.slot is None) == (request.in_flight == 0 and request.status is not Status.RUNNING)
            assert request.computed == 0 or request.status is not Status.WAITING

    def _check_equal(self, places: list[tuple[Request, int]]) -> None:
        """Whoever shares a page has it at the same place, after the same tokens."""
        prefixes = {
            (index, self.known[request].truth[: (index + 1) * self.config.page_size])
            for request, index in places
        }
        assert len(places) == 1 or len(prefixes) == 1

    def check_end(self) -> None:
        """Once nothing is left to do."""
        self.check()
        metrics = self.scheduler.metrics
        assert metrics.waiting == metrics.running == sum(metrics.pages_used) == 0
        for request, known in self.known.items():
            assert request.status is Status.ENDED and request.slot is None and request.in_flight == 0
            if request in self.cancelled:
                assert request.output == known.expected[: len(request.output)]
            else:
                assert request.output == known.expected
