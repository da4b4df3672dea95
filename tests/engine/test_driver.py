"""Who waits is told: threads, coroutines and event loops at once, on a loop without a device."""

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from jaxopt_llm.engine.driver import Driver
from jaxopt_llm.engine.generation import Generation
from jaxopt_llm.engine.loop import Loop
from jaxopt_llm.engine.plan import Request
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.engine.stream import Stream

PATIENCE = 20.0  # seconds until something counts as stuck
TOKENS = 6


class Steps(Loop):
    """Each step gives every request its next token: its place. `before` is called first."""

    def __init__(self, before=lambda: None):
        self.before, self.steps, self.running = before, 0, []

    def add(self, generation):
        self.running.append(generation)

    def cancel(self, generation):
        generation.end("cancelled")
        self.running.remove(generation)

    def advance(self):
        self.before()
        self.steps += 1
        for generation in self.running:
            generation.add(len(generation.tokens), None, time.perf_counter())
        self.running = [generation for generation in self.running if not generation.ended]


def submit(driver, tokens=TOKENS):
    generation = Generation(
        Request(id=0, prompt=[1], max_tokens=tokens),
        SamplingParams(),
        seed=0,
        stop_ids=frozenset(),
        tokenizer=None,
        start=0.0,
    )
    stream = Stream(driver, generation)
    driver.add([generation])
    return stream


class InStep:
    """Readers that must all have read each token before the next step may be over."""

    def __init__(self, readers):
        self.read, self.changed = [0] * readers, threading.Condition()
        self.loop = Steps(self.wait_for_all)
        driver = Driver(self.loop)
        self.streams = [submit(driver) for _ in range(readers)]

    def wait_for_all(self):
        with self.changed:
            level = lambda: min(self.read) >= self.loop.steps
            assert self.changed.wait_for(level, PATIENCE), (
                f"tokens read when {self.loop.steps} are there: {self.read}"
            )

    def take(self, reader, chunk):
        with self.changed:
            self.read[reader] += len(chunk.token_ids)
            self.changed.notify_all()

    def iterate(self, reader):
        for chunk in self.streams[reader]:
            self.take(reader, chunk)

    def coroutines(self, *readers):
        async def follow(reader):
            async for chunk in self.streams[reader]:
                self.take(reader, chunk)

        async def all_of_them():
            await asyncio.gather(*map(follow, readers))

        asyncio.run(all_of_them())


def in_threads(*calls):
    errors = []

    def run(function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    "groups",
    [
        [("coroutines", 0, 1, 2)],
        [("iterate", 0), ("iterate", 1), ("iterate", 2)],
        [("coroutines", 0), ("coroutines", 1)],
        [("coroutines", 0, 1), ("iterate", 2), ("coroutines", 3)],
    ],
    ids=["coroutines", "threads", "event loops", "all"],
)
def test_everybody_is_told_of_a_step_before_the_next_is_over(groups):
    readers = InStep(sum(len(group) - 1 for group in groups))
    in_threads(*((getattr(readers, kind), *numbers) for kind, *numbers in groups))
    assert readers.read == [TOKENS] * len(readers.read)
    assert readers.loop.steps == TOKENS


def test_many_results_at_once():
    loop = Steps()
    driver = Driver(loop)

    async def main():
        return await asyncio.gather(*(submit(driver, 1 + i % TOKENS) for i in range(50)))

    assert [len(result.token_ids) for result in asyncio.run(main())] == [1 + i % TOKENS for i in range(50)]
    assert loop.steps == TOKENS


def test_a_cancelled_wait_loses_no_token():
    begun, go_on = threading.Event(), threading.Event()
    loop = Steps(lambda: begun.set() or go_on.wait(PATIENCE))
    driver = Driver(loop)
    stream = submit(driver)

    async def main():
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.to_thread(begun.wait, PATIENCE)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        return [token async for chunk in stream for token in chunk.token_ids]

    assert asyncio.run(main()) == list(range(TOKENS))
    assert driver._waiting == set()


def test_a_task_that_is_cancelled_ends_the_request_that_only_it_holds():
    loop = Steps(lambda: time.sleep(1e-3))
    driver = Driver(loop)

    async def main():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(submit(driver, 10**6), 0.02)

    asyncio.run(main())
    gc.collect()
    assert driver.call(lambda: loop.running) == []


def test_an_event_loop_that_is_gone_hinders_nobody():
    begun, go_on = threading.Event(), threading.Event()
    driver = Driver(Steps(lambda: begun.set() or go_on.wait(PATIENCE)))
    lost, stream = submit(driver), submit(driver)
    events = asyncio.new_event_loop()
    events.set_exception_handler(lambda *about: None)  # asyncio says of the task that it never ended
    task = events.create_task(anext(lost))
    events.run_until_complete(asyncio.to_thread(begun.wait, PATIENCE))
    events.close()
    go_on.set()
    assert stream.result().token_ids == lost.result().token_ids == list(range(TOKENS))
    assert not task.done()


def test_an_error_is_told_to_all_who_wait():
    def fail():
        if loop.steps >= 2:
            raise MemoryError("no room")

    loop = Steps(fail)
    driver = Driver(loop)
    streams = [submit(driver) for _ in range(4)]

    async def follow(stream):
        return [chunk async for chunk in stream]

    async def main():
        waits = [*streams[:2], *map(follow, streams[2:])]
        return await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), PATIENCE)

    assert [type(error) for error in asyncio.run(main())] == [MemoryError] * 4
    with pytest.raises(MemoryError):
        streams[0].result()


def test_a_call_comes_between_two_steps():
    """Also while another thread makes steps without a pause; what it raises, it raises for its caller."""
    busy = []

    def step():
        busy.append(True)
        time.sleep(1e-3)
        busy.pop()

    loop = Steps(step)
    driver = Driver(loop)
    stream = submit(driver, 10**6)
    leader = threading.Thread(target=stream.result)
    leader.start()
    assert [driver.call(lambda: list(busy)) for _ in range(5)] == [[]] * 5
    with pytest.raises(ZeroDivisionError):
        driver.call(lambda: 1 / 0)
    stream.cancel()
    leader.join(PATIENCE)
    assert not leader.is_alive()
    assert stream.result().finish_reason == "cancelled"


def test_chunks_have_the_tokens_that_are_new():
    driver = Driver(Steps())
    stream = submit(driver)
    first = next(stream)
    assert (first.text, first.token_ids, first.result) == ("", [0], None)
    submit(driver, 2).result()  # runs steps for both
    *others, last = stream
    assert [chunk.token_ids for chunk in [*others, last]] == [[1, 2], [3], [4], [5]]
    assert last.result.token_ids == list(range(TOKENS))


@pytest.mark.parametrize("end", ["close", "with", "aclose", "async with", "drop"])
def test_the_ends_of_a_stream(end):
    loop = Steps()
    driver = Driver(loop)
    stream = submit(driver)
    next(stream)

    async def leave():
        if end == "aclose":
            await stream.aclose()
        async with stream if end == "async with" else contextlib.nullcontext():
            pass

    match end:
        case "close":
            stream.close()
        case "with":
            with stream:
                pass
        case "aclose" | "async with":
            asyncio.run(leave())
    if end != "drop":
        assert list(stream) == []
        assert stream.result().finish_reason == "cancelled"
        assert stream.result().token_ids == [0]
    del stream
    assert driver.call(lambda: loop.running) == []


def test_what_ended_is_not_cancelled():
    driver = Driver(Steps())
    stream = submit(driver)
    stream.result()
    stream.close()
    assert not driver._asked
    assert stream.result().finish_reason == "length"
