"""Text from tokens as they come: never half a character, never past a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import SupportsInt

from jaxopt_llm.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one answer into text, some at a time.

    What `add` and `flush` return, joined, is `tokenizer.decode` of all the ids, or, with `stop`, that up to
    the first stop string. A character that tokens have begun and not finished is held back, as is what may be
    the start of a stop string. The cost of each call is linear in what it is given.

    Args:
      tokenizer: whose ids these are.
      prompt: ids that the answer continues. SentencePiece writes a space before every word, and decoding
        drops the one before the first; after a prompt it stays, so that prompt and answer can be joined.
      stop: strings that end the text.
      skip_special: leave out special tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Iterable[SupportsInt] = (),
        stop: Sequence[str] = (),
        skip_special: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = tokenizer.space_prefix and not tokenizer.to_bytes(prompt)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met."""
        return self._stop.matched

    def add(self, ids: Iterable[SupportsInt]) -> str:
        """The text that `ids` settle."""
        data = self._tokenizer.to_bytes(ids, skip_special=self._skip_special)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._stop.add(self._utf8.decode(data))

    def flush(self) -> str:
        """What was held back, at the end; an unfinished character becomes U+FFFD."""
        return self._stop.add(self._utf8.decode(b"", final=True)) + self._stop.flush()


class StopStrings:
    """Lets text through up to the stop string that is complete first; of two complete at once, the longer.

    Raises:
      ValueError: if a stop string is empty.
    """

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"{stop=} must be a list of strings that are not empty")
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> str:
        """What of the text so far is certain to come before any stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        starts = {stop: text.find(stop) for stop in self._stop}
        found = [stop for stop in self._stop if starts[stop] >= 0]
        if found:
            self.matched = min(found, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            self._held = ""
            return text[: starts[self.matched]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` starts with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
