"""One page that holds everything, figures, plots and styles: it asks for nothing from elsewhere."""

import html
import importlib.util
from collections.abc import Iterator, Sequence

from jaxopt_llm.report.row import Row
from jaxopt_llm.report.table import Column, columns
from jaxopt_llm.report.theme import CSS, swatch

_INTERVALS = (
    "Brackets and bars are intervals of 95 % confidence from how windows of the text differ. All models read the same "
    "windows: differences between models are surer than the intervals."
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
<div class="table"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<div class="figures">
{figures}
</div>
<footer>
{notes}
</footer>
</main>
</body>
</html>
"""
_FIGURE = """<figure>
<figcaption><b>{title}</b><span>{caption}</span></figcaption>
<div class="legend">{legend}</div>
{svg}
</figure>"""


def require_plots() -> None:
    """Raises ValueError if there is no matplotlib to draw with: to be asked before minutes of work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a page with plots needs matplotlib; pip install 'jaxopt-llm[eval]'")


def page(title: str, rows: Sequence[Row], *, subtitle: str = "", notes: Sequence[str] = ()) -> str:
    """An HTML page of the models' figures, for light and dark screens.

    Args:
      title: of the page.
      rows: the models in order; their colours follow it.
      subtitle: what they were measured on.
      notes: paragraphs below the figures.

    Raises:
      ValueError: if matplotlib is not installed.
    """
    require_plots()
    shown = columns(rows)
    return _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        css=CSS,
        heads="".join(f"<th>{html.escape(column.title)}</th>" for column in shown),
        body="\n".join(_table_row(index, row, shown) for index, row in enumerate(rows)),
        figures="\n".join(_figures(rows)),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in (*notes, _INTERVALS)),
    )


def _table_row(index: int, row: Row, shown: Sequence[Column]) -> str:
    first, *others = (_cell(column, row) for column in shown)
    return f"<tr><td>{swatch(index)}{first}</td>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def _cell(column: Column, row: Row) -> str:
    below = column.below(row)
    return html.escape(column.text(row) or "–") + (f"<small>{html.escape(below)}</small>" if below else "")


def _figures(rows: Sequence[Row]) -> Iterator[str]:
    from jaxopt_llm.report.plots import PLOTS  # the rest does without matplotlib

    for plot in PLOTS:
        shown = {index: row for index, row in enumerate(rows) if plot.shows(row)}
        if shown:
            legend = "".join(f"<span>{swatch(i)}{html.escape(row.name)}</span>" for i, row in shown.items())
            yield _FIGURE.format(title=plot.title, caption=plot.caption, legend=legend, svg=plot.svg(shown))
