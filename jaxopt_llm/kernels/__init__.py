"""Floor 1: one public function an op, each with a plain `jax.numpy` definition."""

from jaxopt_llm.kernels.attention import AttentionSpec, Rows, attention
from jaxopt_llm.kernels.formats import FORMATS, Format, quantization_format, round_symmetric
from jaxopt_llm.kernels.linear import embed, linear, round_activations
from jaxopt_llm.kernels.moe import grouped_linear, moe
from jaxopt_llm.kernels.norm import per_feature, rms_norm
from jaxopt_llm.kernels.packed import Packed, pack
from jaxopt_llm.kernels.pages import CombinedPages, LayerCache, Pages, init_pages
from jaxopt_llm.kernels.qarray import QArray, Weight

__all__ = [
    "FORMATS",
    "AttentionSpec",
    "CombinedPages",
    "Format",
    "LayerCache",
    "Packed",
    "Pages",
    "QArray",
    "Rows",
    "Weight",
    "attention",
    "embed",
    "grouped_linear",
    "init_pages",
    "linear",
    "moe",
    "pack",
    "per_feature",
    "quantization_format",
    "rms_norm",
    "round_activations",
    "round_symmetric",
]
