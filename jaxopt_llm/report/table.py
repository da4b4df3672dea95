"""The columns of a table of models, for a page or a terminal."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxopt_llm.evaluate.estimate import Interval
from jaxopt_llm.report.row import Row


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure's title, how it is written, and what stands below it, mostly its interval; empty where there is none."""

    title: str
    text: Callable[[Row], str]
    below: Callable[[Row], str] = lambda row: ""


def columns(rows: Sequence[Row]) -> list[Column]:
    """Those in which any row has something."""
    return [column for column in _COLUMNS if any(column.text(row) for row in rows)]


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def _digits(value: float | None, digits: int = 4) -> str:
    """So many significant digits, never in powers of ten where people can read the number."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def _between(interval: Interval | None, text: Callable[[float], str]) -> str:
    return "" if interval is None else f"[{text(interval[0])}, {text(interval[1])}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


_COLUMNS = (
    Column("model", lambda row: row.name),
    Column("parameters", lambda row: f"{row.parameters / 1e6:,.2f} M"),
    Column("file, MB", lambda row: _megabytes(row.file_bytes)),
    Column(
        "memory, MB",
        lambda row: _megabytes(row.bytes),
        lambda row: f"{8 * row.bytes / row.parameters:.2f} bits a parameter",
    ),
    Column(
        "perplexity",
        lambda row: _digits(row.perplexity),
        lambda row: _between(row.perplexity_interval, _digits),
    ),
    Column(
        "bits a byte",
        lambda row: _digits(row.bits_per_byte),
        lambda row: _between(row.bits_per_byte_interval, _digits),
    ),
    Column(
        "KL divergence",
        lambda row: _digits(row.kld_mean, 3),
        lambda row: _between(row.kld_interval, lambda value: _digits(value, 3)),
    ),
    Column(
        "same top token, %",
        lambda row: _percent(row.same_top_p),
        lambda row: _between(row.same_top_interval, _percent),
    ),
    Column("decode, tokens/s", lambda row: _digits(row.decode_tokens_per_s, 3)),
)
