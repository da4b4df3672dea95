"""SmoothQuant (arXiv:2211.10438): large activations are divided, and what they meet multiplied."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_llm.calibrate import LayerWeights, Statistics, Wants, inputs
from jaxopt_llm.kernels import Weight, quantization_format
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.quantize.folds import Fold, floats, folds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Scales folded into neighbours so that activations and weights round equally well, then rounding to nearest.

    Attributes:
      format: a name that `quantization_format` knows, one that rounds activations.
      strength: how much of the activations' range the weights take over, from 0 to 1.
    """

    format: str = "w8a8"
    strength: float = 0.5

    def __post_init__(self):
        quantization_format(self.format)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie between 0 and 1")

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return (Wants(products=tuple(name for names in inputs(config, layer) for name in names)),)

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, Weight]:
        form, changed = quantization_format(self.format), dict(weights)
        for fold in folds(config, layer):
            scale = self.scale(fold, changed, statistics[fold.products[0]].max_abs)
            changed |= fold.apply(changed, scale)
        for product in statistics:
            name = f"{product}.weight"
            form.check(changed[name].shape[-1], f"layers.{layer}.{name}")
            changed[name] = form.quantize(floats(changed[name]))
        return changed

    def scale(self, fold: Fold, weights: LayerWeights, largest: Float[Array, "I"]) -> Float[Array, "C"]:
        """`max|X_j|**a / max|W_j|**(1-a)` of each channel (equation 4); 1 where nothing was seen or nothing reads."""
        read = jnp.stack([jnp.abs(floats(weights[f"{name}.weight"])).max(0) for name in fold.products]).max(0)
        x, w = fold.pool(largest, jnp.max), fold.pool(read, jnp.max)
        idle = (x == 0) | (w == 0)
        return jnp.where(idle, 1.0, x**self.strength / jnp.where(idle, 1.0, w) ** (1 - self.strength))
