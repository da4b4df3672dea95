"""Floor 7: which chips serve a model under given traffic, before any is rented."""

from jaxopt_llm.size.ahead import Collective, Compiled, Program, compile_ahead
from jaxopt_llm.size.efficiency import UNCERTAINTY
from jaxopt_llm.size.explain import explanation
from jaxopt_llm.size.plot import check_plot, draw
from jaxopt_llm.size.sweep import Bytes, Candidate, Levels, Percentiles, chips_of, confirm, sweep
from jaxopt_llm.size.topology import Topology
from jaxopt_llm.size.traffic import Asked, Traffic, traffic

__all__ = [
    "UNCERTAINTY",
    "Asked",
    "Bytes",
    "Candidate",
    "Collective",
    "Compiled",
    "Levels",
    "Percentiles",
    "Program",
    "Topology",
    "Traffic",
    "check_plot",
    "chips_of",
    "compile_ahead",
    "confirm",
    "draw",
    "explanation",
    "sweep",
    "traffic",
]
