"""Floor 6: figures of several models side by side, as a table, as JSON and as a page with plots."""

from jaxopt_llm.report.figures import check_plot
from jaxopt_llm.report.page import page, require_plots
from jaxopt_llm.report.row import HISTOGRAM_EDGES, Row, Subject, measure
from jaxopt_llm.report.schedule import draw_schedule
from jaxopt_llm.report.table import Column, columns

__all__ = [
    "HISTOGRAM_EDGES",
    "Column",
    "Row",
    "Subject",
    "check_plot",
    "columns",
    "draw_schedule",
    "measure",
    "page",
    "require_plots",
]
