"""Plots of several models as SVG, coloured by the page that they stand in: it needs matplotlib.

Every colour is the name of a CSS variable of the page, so that one drawing serves a light and a dark page.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxopt_llm.report.row import HISTOGRAM_EDGES, Row
from jaxopt_llm.report.theme import SERIES, SHAPES

Shown = Mapping[int, Row]

_MARKERS = "".join(SHAPES)
_DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))

# What matplotlib draws with, in place of which the page's variables are put.
_INK, _MUTED, _GRID, _SURFACE = "#000a01", "#000a02", "#000a03", "#000a04"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _SURFACE: "surface"} | {
    f"#000b{i:02x}": f"series-{i}" for i in range(SERIES)
}
_POINT: dict[str, Any] = {"markersize": 8, "markeredgecolor": _SURFACE, "markeredgewidth": 0.6}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.min_exponent": 4,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot: what it is called, of which models it can tell something, and how they are drawn onto axes."""

    title: str
    caption: str
    shows: Callable[[Row], bool]
    draw: Callable[[Axes, Shown], None]

    def svg(self, rows: Shown) -> str:
        """The drawing, an SVG element in the page's colours.

        Args:
          rows: the models that it shows, by their place among all.
        """
        with mpl.rc_context(_STYLE | {"svg.hashsalt": self.title}):
            figure = Figure(figsize=(5.6, 3.4), layout="constrained")
            self.draw(figure.add_subplot(), rows)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return _for_a_page(file.getvalue())


def _sizes(axes: Axes, rows: Shown, figure: str, interval: str, label: str) -> None:
    values = [getattr(row, figure) for row in rows.values()]
    for (index, row), value in zip(rows.items(), values, strict=True):
        size = row.bytes / 1e6
        low, high = getattr(row, interval) or (value, value)
        axes.plot([size, size], [max(low, value / 10), high], color=_color(index), linewidth=1.2, alpha=0.55)
        axes.plot(size, value, _marker(index), color=_color(index), **_POINT)
    if max(values) > 3 * min(values):
        axes.set_yscale("log")
    axes.set_xlim(0, 1.08 * max(row.bytes for row in rows.values()) / 1e6)
    axes.set(xlabel="weights in memory, MB", ylabel=label)


def _histograms(axes: Axes, rows: Shown) -> None:
    for index, row in rows.items():
        share = 100 * np.array(row.kld_histogram)
        axes.stairs(share, HISTOGRAM_EDGES, color=_color(index), linestyle=_dash(index), linewidth=1.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="KL divergence of a token's prediction, nats", ylabel="% of tokens")


def _layers(axes: Axes, rows: Shown) -> None:
    for index, row in rows.items():
        errors = row.layer_errors or ()
        axes.plot(errors, _marker(index), color=_color(index), linestyle=_dash(index), markersize=3.5)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="error over what the layer adds")


PLOTS = (
    Plot(
        "Size and perplexity",
        "Lower and further left is better.",
        lambda row: True,
        lambda axes, rows: _sizes(axes, rows, "perplexity", "perplexity_interval", "perplexity"),
    ),
    Plot(
        "Size and divergence",
        "How far predictions lie from the reference's.",
        lambda row: (row.kld_mean or 0) > 0,  # rounding may leave less for a model like the reference
        lambda axes, rows: _sizes(axes, rows, "kld_mean", "kld_interval", "KL divergence, nats a token"),
    ),
    Plot(
        "Divergence of single tokens",
        "What a mean hides: how many predictions are far off.",
        lambda row: bool(row.kld_histogram),
        _histograms,
    ),
    Plot(
        "Sensitivity of layers",
        "The error of each layer, given what the reference's layer reads.",
        lambda row: any(row.layer_errors or ()),
        _layers,
    ),
)


def _color(index: int) -> str:
    return f"#000b{index % SERIES:02x}"


def _marker(index: int) -> str:
    return _MARKERS[index % SERIES]


def _dash(index: int) -> Any:
    """Colours come again after `SERIES` models, in other dashes."""
    return _DASHES[index // SERIES % len(_DASHES)]


def _for_a_page(svg: str) -> str:
    """A drawing as part of a page: its fonts and colours, its width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick)[^"]*"', "", svg)
    for sentinel, name in _VARIABLES.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    return svg
