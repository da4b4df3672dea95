"""Floor 5: how good a model is, with the error of the figure, and how fast."""

from jaxopt_llm.evaluate.quality import Comparison, Perplexity, compare, perplexity
from jaxopt_llm.evaluate.timing import Speed, speed

__all__ = ["Comparison", "Perplexity", "Speed", "compare", "perplexity", "speed"]
