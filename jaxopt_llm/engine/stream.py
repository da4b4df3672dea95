"""What one request gives, as it comes."""

import weakref
from collections.abc import Generator
from typing import Any, Self

from jaxopt_llm.engine.driver import Driver
from jaxopt_llm.engine.generation import Generation
from jaxopt_llm.engine.request import Chunk, Result


class Stream:
    """Iterates over `Chunk`s, by `for` or `async for`; awaited, it gives the `Result`.

    Each chunk has new text, or new tokens where there is no tokenizer; the last has the result. Iterating runs the
    engine, for everybody's requests. A wait that is interrupted, or whose task is cancelled, leaves the request under
    way; it ends early by `cancel` or `close`, at the end of a `with` or `async with`, or when the stream is dropped.

    Raises:
      RuntimeError: where it waits, if a step of the engine failed.
    """

    def __init__(self, driver: Driver, generation: Generation):
        self._driver, self._generation = driver, generation
        self._over = False
        self._cancel = weakref.finalize(self, driver.cancel, generation)
        self._cancel.atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if not self._over:
            self._driver.wait(self._has_news)
        if self._over:
            raise StopIteration
        return self._chunk()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if not self._over:
            await self._driver.wait_async(self._has_news)
        if self._over:  # another task may have taken the last
            raise StopAsyncIteration
        return self._chunk()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._finish().__await__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def result(self) -> Result:
        """Waits for the end."""
        self._driver.wait(self._has_ended)
        return self._generation.result()

    def cancel(self) -> None:
        """Ends the request where it is; nothing happens if it has ended. What has come of it can still be read."""
        self._cancel()

    def close(self) -> None:
        """Ends the request, and the iteration: no more chunks come."""
        self._over = True
        self.cancel()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    async def _finish(self) -> Result:
        await self._driver.wait_async(self._has_ended)
        return self._generation.result()

    def _has_news(self) -> bool:
        return self._generation.has_news or self._generation.ended

    def _has_ended(self) -> bool:
        return self._generation.ended

    def _chunk(self) -> Chunk:
        self._over = self._generation.ended  # first: what has ended says all that it has to say
        text, token_ids = self._generation.fresh()
        return Chunk(text, token_ids, self._generation.result() if self._over else None)
