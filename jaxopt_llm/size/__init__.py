"""Floor 7: which chips serve a model under given traffic, before any is rented."""

from jaxopt_llm.size.ahead import Collective, Compiled, Program, compile_ahead
from jaxopt_llm.size.candidate import Bytes, Candidate, Levels, Percentiles
from jaxopt_llm.size.confirm import confirm
from jaxopt_llm.size.efficiency import SERVER, UNCERTAINTY, Efficiency
from jaxopt_llm.size.explain import explanation
from jaxopt_llm.size.here import here
from jaxopt_llm.size.measured import HeldOut, Run, fit, held_out, settled, uncertainty, untold
from jaxopt_llm.size.measured import append as append_run
from jaxopt_llm.size.measured import read as read_runs
from jaxopt_llm.size.model import FLOAT
from jaxopt_llm.size.plot import draw
from jaxopt_llm.size.serving import check_new, serving, source, write
from jaxopt_llm.size.sweep import chip_names, chips_of, sweep
from jaxopt_llm.size.topology import Topology
from jaxopt_llm.size.traffic import Asked, Traffic, traffic

__all__ = [
    "FLOAT",
    "SERVER",
    "UNCERTAINTY",
    "Asked",
    "Bytes",
    "Candidate",
    "Collective",
    "Compiled",
    "Efficiency",
    "HeldOut",
    "Levels",
    "Percentiles",
    "Program",
    "Run",
    "Topology",
    "Traffic",
    "append_run",
    "check_new",
    "chip_names",
    "chips_of",
    "compile_ahead",
    "confirm",
    "draw",
    "explanation",
    "fit",
    "held_out",
    "here",
    "read_runs",
    "serving",
    "settled",
    "source",
    "sweep",
    "traffic",
    "uncertainty",
    "untold",
    "write",
]
