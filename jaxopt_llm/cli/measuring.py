"""A text to measure on, and bars for the stages of long work."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxopt_llm.cli import show


def read_text(path: str) -> str:
    """A UTF-8 file as it is, its line ends untouched.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is not UTF-8.
    """
    data = Path(path).expanduser().read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8 text; convert the file, as with iconv -t UTF-8"
        ) from None


@contextlib.contextmanager
def stages(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one after another, for work that tells its stages: gives `report(stage, done, of all)`."""
    with contextlib.ExitStack() as bar:
        current, last = "", 0
        advance: Callable[[float], None]

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current, last, advance
            if stage != current:
                bar.close()
                advance = bar.enter_context(show.progress(stage, total, unit))
                current, last = stage, 0
            advance(done - last)
            last = done

        yield report
