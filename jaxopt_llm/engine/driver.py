"""Who advances the loop: whoever waits for something of it, one at a time.

A thread that waits makes the steps itself while no other is at it; for coroutines one worker thread of the engine does.
After every step all are told that have what they wait for, whoever made it. What is asked of the loop (requests, ends
of requests) is noted without waiting, in any thread, and taken up before the next step.
"""

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from jaxopt_llm.engine import interrupts
from jaxopt_llm.engine.generation import Generation
from jaxopt_llm.engine.loop import Loop

Ready = Callable[[], bool]
T = TypeVar("T")


class Driver:
    """Steps of one loop, for threads and coroutines of any event loop."""

    def __init__(self, loop: Loop):
        self._loop = loop
        self._asked: deque[Callable[[], object]] = deque()
        # By its own name, since an interrupt can leave a condition's `with` locked, and not a lock's.
        self._mutex = threading.Lock()  # of what follows
        self._turns = threading.Condition(self._mutex)  # told when a step is over
        self._leader: int | None = None  # the thread that makes a step
        self._waiting: set[_Waiting] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="jaxopt_llm")

    def add(self, generations: Sequence[Generation]) -> None:
        """Takes requests in that the loop has checked."""
        self._asked.extend(functools.partial(self._loop.add, generation) for generation in generations)

    def cancel(self, generation: Generation) -> None:
        """Ends a request where it is; nothing happens if it has ended. Takes no lock: a finalizer may call it."""
        if not generation.ended:
            self._asked.append(functools.partial(self._loop.cancel, generation))

    def call(self, function: Callable[[], T]) -> T:
        """What a function gives that has the loop to itself, between two steps."""
        answer: Future[T] = Future()
        self._asked.append(functools.partial(_answer, answer, function))
        try:
            self.wait(answer.done)
        finally:
            answer.cancel()  # does nothing once it is done
        return answer.result()

    def wait(self, ready: Ready) -> None:
        """Until what the caller waits for is there.

        Raises:
          RuntimeError: if an earlier step failed, or for a call out of what a step itself calls.
        """
        while not ready():
            if not self._lead(ready):
                with self._mutex:
                    self._turns.wait_for(lambda: self._leader is None or ready())

    async def wait_async(self, ready: Ready) -> None:
        """As `wait`, in a coroutine, which may be cancelled: what it waits for goes on."""
        if ready():
            return
        waiting = _Waiting(ready)
        with self._mutex:
            self._waiting.add(waiting)
        try:
            self._worker.submit(self._serve, waiting)
            await waiting.told
        finally:
            waiting.over = True
            with self._mutex:
                self._waiting.discard(waiting)

    def _serve(self, waiting: "_Waiting") -> None:
        """Runs in the worker thread."""
        try:
            self.wait(waiting.look)
        except BaseException as error:
            waiting.tell(error)

    def _lead(self, ready: Ready) -> bool:
        """Takes up what was asked and makes a step, unless another thread is at it; an interrupt waits for its end."""
        with interrupts.deferred():
            if not self._begin():
                return False
            try:
                while self._asked:
                    self._asked.popleft()()
                if not ready():
                    self._loop.advance()
            finally:
                self._end()
        return True

    def _begin(self) -> bool:
        own = threading.get_ident()
        with self._mutex:
            if self._leader == own:
                raise RuntimeError(
                    "the engine is planning a step, and cannot be used by what it calls meanwhile"
                )
            if self._leader is None:
                self._leader = own
            return self._leader == own

    def _end(self) -> None:
        with self._mutex:
            self._leader = None
            self._turns.notify_all()
            everyone = tuple(self._waiting)
        for waiting in everyone:
            waiting.look()


class _Waiting:
    """A coroutine that waits, seen from other threads.

    Attributes:
      told: what it awaits.
      over: it has been told, or waits no more.
    """

    def __init__(self, ready: Ready):
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self.told: asyncio.Future[None] = self._loop.create_future()
        self.over = False

    def look(self) -> bool:
        """Tells it if it is time; whether nobody waits any more."""
        if not self.over and self._ready():
            self.tell()
        return self.over

    def tell(self, error: BaseException | None = None) -> None:
        self.over = True
        with contextlib.suppress(RuntimeError):  # its event loop is closed
            self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: BaseException | None) -> None:
        if self.told.done():
            return
        if error is None:
            self.told.set_result(None)
        else:
            self.told.set_exception(error)


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(function())
    except BaseException as error:
        answer.set_exception(error)
