"""Floor 1: one public function an op, each with a plain `jax.numpy` definition."""

from jaxopt_llm.kernels.attention import AttentionSpec, Pages, Rows, attention
from jaxopt_llm.kernels.linear import embed, linear, round_activations
from jaxopt_llm.kernels.moe import grouped_linear, moe
from jaxopt_llm.kernels.norm import rms_norm
from jaxopt_llm.kernels.qarray import QArray, Weight, round_symmetric

__all__ = [
    "AttentionSpec",
    "Pages",
    "QArray",
    "Rows",
    "Weight",
    "attention",
    "embed",
    "grouped_linear",
    "linear",
    "moe",
    "rms_norm",
    "round_activations",
    "round_symmetric",
]
