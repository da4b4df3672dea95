"""The page: it holds what the table holds, stands alone, and is well formed."""

import html.parser
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxopt_llm.report import Row, columns, page
from jaxopt_llm.report.plots import PLOTS
from jaxopt_llm.report.row import histogram

FLOAT = Row(
    name="float <b>",
    parameters=134_515_008,
    file_bytes=None,
    bytes=538_060_032,
    perplexity=28.43,
    perplexity_interval=(24.1, 33.6),
    bits_per_byte=0.9845,
    bits_per_byte_interval=None,
)
SMALL = Row(
    name="int8",
    parameters=134_515_008,
    file_bytes=136_000_000,
    bytes=135_500_000,
    perplexity=28.63,
    perplexity_interval=(24.3, 33.8),
    bits_per_byte=0.9862,
    bits_per_byte_interval=None,
    kld_mean=0.00731,
    kld_interval=(0.0066, 0.0081),
    same_top_p=0.946,
    same_top_interval=(0.94, 0.952),
    kld_histogram=histogram(np.random.default_rng(0).lognormal(-5, 1, 500)),
    layer_errors=(0.01, 0.02, 0.015),
    decode_tokens_per_s=157.3,
)
ROWS = (FLOAT, SMALL)


def text_of(markup):
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_data = found.append
    parser.feed(markup)
    return " ".join(" ".join(found).split())


@pytest.fixture(scope="module")
def markup():
    return page("Two models", ROWS, subtitle="on <a text>", notes=("Measured & told.",))


def test_every_figure_is_in_the_table(markup):
    text = text_of(markup)
    for figure in (
        "float <b> 134.52 M – 538 32.00 bits a parameter 28.43 [24.10, 33.60] 0.9845 – – –",
        "int8 134.52 M 136 136 8.06 bits a parameter 28.63 [24.30, 33.80] 0.9862",
        "0.00731 [0.00660, 0.00810] 94.6 [94.0, 95.2] 157",
    ):
        assert figure in text
    assert "on <a text>" in text and "Measured & told." in text


def test_columns_without_a_figure_are_left_out():
    assert [column.title for column in columns([FLOAT])] == [
        "model",
        "parameters",
        "memory, MB",
        "perplexity",
        "bits a byte",
    ]
    assert len(columns(ROWS)) == 9


def test_the_page_asks_for_nothing(markup):
    for link in re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')>\s]+)""", markup):
        assert link.startswith("#"), link
    assert "<script" not in markup and "@import" not in markup


def test_every_colour_is_the_page_s(markup):
    body = markup[markup.index("</style>") :]
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", markup))
    light, dark = (set(re.findall(r"(--[\w-]+):", theme)) for theme in re.findall(r":root \{(.*?)\}", markup))
    assert used <= light == dark


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.title)
def test_plots_are_drawings_of_what_they_can_show(plot):
    shown = {index: row for index, row in enumerate(ROWS) if plot.shows(row)}
    assert 1 in shown
    assert (0 in shown) == (plot.title == "Size and perplexity")
    drawing = ET.fromstring(plot.svg(shown).replace("xlink:", ""))
    assert drawing.get("viewBox") and drawing.get("width") is None
    styles = " ".join(part.get("style", "") for part in drawing.iter())
    assert "var(--series-1)" in styles
    assert ("var(--series-0)" in styles) == (0 in shown)


def test_the_same_figures_give_the_same_page(markup):
    assert page("Two models", ROWS, subtitle="on <a text>", notes=("Measured & told.",)) == markup


def test_plots_without_anything_to_show_are_left_out():
    assert page("One", [FLOAT]).count("<figure>") == 1
