"""A model that computes the same from other weights: those of our default model come from a 4-bit file.

Rounding to 4 bits measured on them is rounding twice, or nothing. Here norm gains are folded into the weights that
follow, up and down are scaled against each other, and so are v and o; the final norm stays, for the head is tied.
"""

import jax.numpy as jnp

from jaxopt_llm.calibrate import layer_weights
from jaxopt_llm.models import Transformer, with_weights
from jaxopt_llm.quantize.folds import folds

_STRETCH = 0.3


def off_grid(model: Transformer) -> Transformer:
    """The same function: norm gains of one, and `exp(0.3 * sin(i))` between the channels `i` of the other folds."""
    changed = {}
    for layer in range(model.config.num_layers):
        weights = layer_weights(model, layer)
        for fold in folds(model.config, layer):
            source = weights[f"{fold.source}.weight"]
            scale = (
                source if source.ndim == 1 else jnp.exp(-_STRETCH * jnp.sin(jnp.arange(len(source)) * 1.0))
            )
            weights |= fold.apply(weights, scale)
        changed |= {f"layers.{layer}.{name}": value for name, value in weights.items()}
    return with_weights(model, changed)
