"""What commands print."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxopt_llm.cli import show


def test_a_table_away_from_a_terminal_is_markdown_that_nothing_cuts(capsys):
    show.table(["what", "before"], [["parameters", 134515008], ["x" * 200, None], ["[bold]", 0.00412345]])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "before"]
    assert cells[2:] == [["parameters", "134,515,008"], ["x" * 200, "-"], ["[bold]", "0.004123"]]


def test_fields_are_a_line_each(capsys):
    show.fields({"a": True, "long": ["x", "y"]})
    assert capsys.readouterr().out == "a     yes\nlong  x, y\n"


def test_json_is_one_line_of_plain_values(capsys):
    @dataclasses.dataclass
    class Report:
        perplexity: float
        tokens: object
        out: Path

    show.json_line(
        {"report": Report(math.nan, jnp.arange(2), Path("a")), "rate": np.float32(np.inf), "ok": True}
    )
    [line] = capsys.readouterr().out.splitlines()
    expected = {"report": {"perplexity": None, "tokens": [0, 1], "out": "a"}, "rate": None, "ok": True}
    assert json.loads(line) == expected


def test_progress_leaves_stdout_clean(capsys):
    with show.progress("reading", total=4, unit="B") as advance:
        for _ in range(4):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading" in err
    assert "100 %" in err
    assert "B/s" in err
