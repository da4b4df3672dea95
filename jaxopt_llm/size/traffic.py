"""Who asks for what, and when: drawn from a rate or a concurrency, or read from a trace file."""

import dataclasses
import datetime
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BLOCK = 512  # tokens that one of Mooncake's hash ids stands for
_FORMS = (  # columns: when, tokens read, tokens written
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    (None, "num_prefill_tokens", "num_decode_tokens"),
)


class Asked(NamedTuple):
    """A request.

    Attributes:
      at: seconds from the start; not looked at where a fixed number of requests run at once.
      prompt: tokens to read.
      output: tokens to write.
      blocks: ids of the prompt's blocks of 512 tokens, equal where prompts share them; none where all differ.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests that come at their own times, or `concurrency` at once, the next whenever one ends."""

    asked: tuple[Asked, ...]
    concurrency: int | None = None

    @property
    def prompt(self) -> float:
        """Mean length."""
        return sum(one.prompt for one in self.asked) / len(self.asked)

    @property
    def output(self) -> float:
        """Mean length."""
        return sum(one.output for one in self.asked) / len(self.asked)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(one.prompt + one.output for one in self.asked)

    @property
    def rate(self) -> float | None:
        """Requests a second; None at a fixed concurrency."""
        if self.concurrency is not None:
            return None
        span = self.asked[-1].at - self.asked[0].at
        return (len(self.asked) - 1) / span if span else math.inf

    def part(self, shards: int) -> "Traffic":
        """What one of so many data shards gets: every so many-th request, or its part of the concurrency."""
        each = None if self.concurrency is None else max(1, self.concurrency // shards)
        return Traffic(asked=self.asked[::shards], concurrency=each)


def traffic(
    *,
    prompt: tuple[int, int] = (1024, 1024),
    output: tuple[int, int] = (256, 256),
    trace: str | Path | None = None,
    rate: float | None = None,
    concurrency: int | None = None,
    requests: int = 256,
    seed: int = 0,
) -> Traffic:
    """Requests to size for.

    Args:
      prompt, output: shortest and longest, all lengths between alike likely. Not looked at with a trace.
      trace: a file as Azure publishes (`TIMESTAMP,ContextTokens,GeneratedTokens`) or Mooncake
        (JSON lines of `timestamp`, `input_length`, `output_length`, `hash_ids`), or with lengths alone
        (`num_prefill_tokens,num_decode_tokens`).
      rate: requests a second, at random times (Poisson); of a trace the mean, its times stretched.
      concurrency: requests that run at once, in place of times.
      requests: how many; of a trace at most, its first.
      seed: of the random numbers.

    Raises:
      ValueError: for both a rate and a concurrency, or neither where a trace has no times; for lengths that are none;
        for a file of another form.
    """
    for name, value in {"rate": rate, "concurrency": concurrency, "requests": requests}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be more than 0")
    if rate is not None and concurrency is not None:
        raise ValueError(f"{rate=} and {concurrency=} exclude each other: give one of them")
    generator = np.random.default_rng(seed)
    if trace is not None:
        asked = list(itertools.islice(_read(Path(trace)), requests))
        if not asked:
            raise ValueError(f"{trace}: no requests in it")
    else:
        lengths = [
            _drawn(name, span, requests, generator)
            for name, span in (("input_tokens", prompt), ("output_tokens", output))
        ]
        asked = [Asked(math.nan, *pair) for pair in zip(*lengths, strict=True)]
    if concurrency is not None:
        return Traffic(asked=tuple(asked), concurrency=concurrency)
    times = [one.at for one in asked]
    if not any(map(math.isnan, times)):
        stretched = Traffic(asked=tuple(asked)).rate
        scale = 1.0 if rate is None or not stretched else stretched / rate
        times = [(at - times[0]) * scale for at in times]
    elif rate is not None:
        times = np.cumsum(generator.exponential(1 / rate, len(asked))).tolist()
    else:
        raise ValueError("nothing tells when requests come: give a rate or a concurrency")
    return Traffic(asked=tuple(one._replace(at=at) for one, at in zip(asked, times, strict=True)))


def _drawn(name: str, span: tuple[int, int], count: int, generator: np.random.Generator) -> list[int]:
    low, high = span
    if not 1 <= low <= high:
        raise ValueError(f"{name}={low}-{high} must be at least 1, and grow")
    return generator.integers(low, high + 1, count).tolist()


def _read(path: Path) -> Iterator[Asked]:
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
        is_json = first.startswith("{")
        parse = _mooncake if is_json else _columns(path, first.split(","))
        lines = itertools.chain([first] if is_json else [], file)
        for number, line in enumerate(lines, 1):
            try:
                one = parse(line)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: request {number} is damaged: {error!r}") from None
            yield one._replace(prompt=max(1, one.prompt), output=max(1, one.output))


def _mooncake(line: str) -> Asked:
    row = json.loads(line)
    return Asked(row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]))


def _columns(path: Path, names: Sequence[str]) -> Callable[[str], Asked]:
    """What reads a line of comma-separated values."""
    places = {name: place for place, name in enumerate(names)}
    form = next((form for form in _FORMS if set(filter(None, form)) <= set(names)), None)
    if form is None:
        known = " or ".join(",".join(filter(None, form)) for form in _FORMS)
        raise ValueError(
            f"{path}: no trace: it begins with {','.join(names)[:80]!r}, not with {known}, nor is it JSON"
        )

    time, prompt, output = form

    def parse(line: str) -> Asked:
        row = line.strip().split(",")
        if len(row) != len(names):
            raise ValueError(f"{len(row)} columns of {len(names)}")
        at = math.nan if time is None else _seconds(row[places[time]])
        return Asked(at, int(row[places[prompt]]), int(row[places[output]]))

    return parse


def _seconds(text: str) -> float:
    """Of Azure's times, which have a digit more than Python reads."""
    return datetime.datetime.fromisoformat(text[:26]).timestamp()


def prompt_tokens(asked: Asked, number: int) -> list[int]:
    """Token ids of a prompt: those that share a block have its tokens alike, all others differ."""
    if asked.blocks:
        return np.repeat(np.asarray(asked.blocks), _BLOCK)[: asked.prompt].tolist()
    return [number] * asked.prompt
