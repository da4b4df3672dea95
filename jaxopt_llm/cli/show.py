"""What commands print: tables and JSON on stdout, progress bars on stderr."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SI_PREFIXES = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"))


def si(value: float, unit: str = "") -> str:
    """A number in three digits with a prefix: 1.23 MB."""
    scale, prefix = max((unit for unit in SI_PREFIXES if abs(value) >= unit[0]), default=(1, ""))
    scaled = value / scale
    digits = 0 if abs(scaled) >= 100 or scaled == int(scaled) else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {prefix}{unit}".rstrip()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Container[int] = ()) -> None:
    """Prints rows under column names; where stdout is no terminal, as a Markdown table that nothing cuts.

    Args:
      columns: their names.
      rows: a cell a column.
      right: columns that end together.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        grid = Table(box=box.SIMPLE_HEAD)
        for place, name in enumerate(columns):
            grid.add_column(name, justify="right" if place in right else "left")
        for row in cells:
            grid.add_row(*row)
        console.print(grid)
    else:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in [list(columns), ["-" * width for width in widths], *cells]:
            padded = [
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            print("|", " | ".join(padded), "|")


def fields(values: Mapping[str, object]) -> None:
    """Prints one named value a line."""
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:{width}}  {_cell(value)}")


def json_line(value: object) -> None:
    """Prints a JSON object on one line: dataclasses as objects, NaN and infinities as null."""
    print(json.dumps(_plain(value), allow_nan=False))


@contextlib.contextmanager
def progress(description: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
    """A bar on stderr with rate and remaining time; gives `advance(amount)`.

    Away from a terminal only the finished line is printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        _Rate(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total)
        yield lambda amount: bars.advance(task, amount)


def lines(columns: Mapping[str, str]) -> Callable[[Mapping[str, Any]], None]:
    """A table on stderr that grows a row at a time, above a bar if one is there; gives `told(row)`.

    Args:
      columns: keys of a row, and what they are called; what the first row lacks has no column.
    """
    shown: dict[str, str] = {}

    def told(row: Mapping[str, Any]) -> None:
        if not shown:
            shown.update({key: name for key, name in columns.items() if key in row})
            print(*(name.rjust(13) for name in shown.values()), file=sys.stderr)
        print(*(_cell(row[key]).rjust(13) for key in shown), file=sys.stderr)

    return told


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        scale, prefix = max((unit for unit in SI_PREFIXES if speed >= unit[0]), default=(1, ""))
        return Text(f"{speed / scale:.1f} {prefix}{self.unit}/s")


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(map(_cell, value))
    return str(value)


def _plain(value: object) -> Any:
    """`value` in JSON's own types."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        return _plain(value.tolist())
    return str(value)  # paths, dtypes
