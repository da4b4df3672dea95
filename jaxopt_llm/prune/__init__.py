"""Floor 6: models to smaller ones, and weights to zeros."""

from jaxopt_llm.prune.surgery import Kept, cut

__all__ = ["Kept", "cut"]
