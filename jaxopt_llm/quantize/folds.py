"""Scales folded into neighbours: a layer computes the same, and rounds better."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_llm.calibrate import LayerWeights, inputs
from jaxopt_llm.kernels import QArray, Weight
from jaxopt_llm.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Fold:
    """Channels that are divided where they come from and multiplied where they are read.

    Attributes:
      source: a norm, or a product whose rows are the channels.
      products: what reads them, one column a channel.
      repeats: (groups, repeats, width): what reads a channel of a value head is every query head of its group. A
        norm's channels are (1, 1, I).
      norm_offset: what a norm adds to its weight; None where the source is a product.
    """

    source: str
    products: tuple[str, ...]
    repeats: tuple[int, int, int]
    norm_offset: float | None = None

    def pool(self, x: Float[Array, "I"], reduce: Callable[..., Array]) -> Float[Array, "C"]:
        """Values of the columns as one a channel."""
        return reduce(x.reshape(self.repeats), axis=1).reshape(-1)

    def spread(self, scale: Float[Array, "C"]) -> Float[Array, "I"]:
        """Values of the channels as one a column."""
        groups, repeats, width = self.repeats
        return jnp.repeat(scale.reshape(groups, 1, width), repeats, axis=1).reshape(-1)

    def apply(self, weights: LayerWeights, scale: Float[Array, "C"]) -> dict[str, Weight]:
        """The weights that change, float32: the source's channels over `scale`, the products' columns times it."""
        columns = self.spread(scale)[None]
        changed: dict[str, Weight] = {
            f"{name}.weight": floats(weights[f"{name}.weight"]) * columns for name in self.products
        }
        source = floats(weights[f"{self.source}.weight"])
        if self.norm_offset is not None:
            return changed | {f"{self.source}.weight": (source + self.norm_offset) / scale - self.norm_offset}
        changed[f"{self.source}.weight"] = source / scale[:, None]
        if f"{self.source}.bias" in weights:
            changed[f"{self.source}.bias"] = floats(weights[f"{self.source}.bias"]) / scale
        return changed


def folds(config: ModelConfig, layer: int) -> tuple[Fold, ...]:
    """The folds that a layer allows: norm to q, k and v; v to o; norm to gate and up; up to down.

    There are none into norms that stand behind what they normalise, and none into experts.
    """
    norm = {"repeats": (1, 1, config.d_model), "norm_offset": config.norm_offset}
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    sources: dict[str, dict[str, Any]] = {
        "attention.q": {"source": "attention_norm", **norm},
        "attention.o": {"source": "attention.v", "repeats": heads},
        "mlp.gate": {"source": "mlp_norm", **norm},
        "mlp.down": {"source": "mlp.up", "repeats": (1, 1, config.d_ff)},
    }
    every = (Fold(products=names, **sources[names[0]]) for names in inputs(config, layer))
    return tuple(fold for fold in every if config.pre_norm or fold.norm_offset is None)


def floats(weight: Weight) -> Float[Array, "..."]:
    """The values of a weight in float32."""
    return weight.dequantize() if isinstance(weight, QArray) else weight.astype(jnp.float32)
