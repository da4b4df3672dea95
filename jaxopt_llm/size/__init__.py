"""Floor 7: which chips serve a model under given traffic, before any is rented."""

from jaxopt_llm.size.efficiency import UNCERTAINTY
from jaxopt_llm.size.explain import explanation
from jaxopt_llm.size.plot import check_plot, draw
from jaxopt_llm.size.sweep import Bytes, Candidate, Levels, Percentiles, chips_of, sweep
from jaxopt_llm.size.traffic import Asked, Traffic, traffic

__all__ = [
    "UNCERTAINTY",
    "Asked",
    "Bytes",
    "Candidate",
    "Levels",
    "Percentiles",
    "Traffic",
    "check_plot",
    "chips_of",
    "draw",
    "explanation",
    "sweep",
    "traffic",
]
