"""Floor 5: how good a model is, with the error of the figure, and how fast."""

from jaxopt_llm.evaluate.layers import layer_errors, layers_correspond
from jaxopt_llm.evaluate.quality import Comparison, Perplexity, Reading, Reference, compare, perplexity
from jaxopt_llm.evaluate.timing import Speed, Spread, check_lengths, read_bandwidth, speed
from jaxopt_llm.evaluate.windows import check_sizes, check_text

__all__ = [
    "Comparison",
    "Perplexity",
    "Reading",
    "Reference",
    "Speed",
    "Spread",
    "check_lengths",
    "check_sizes",
    "check_text",
    "compare",
    "layer_errors",
    "layers_correspond",
    "perplexity",
    "read_bandwidth",
    "speed",
]
