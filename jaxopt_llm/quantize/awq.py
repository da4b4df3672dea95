"""AWQ (arXiv:2306.00978): channels of large inputs are scaled up before rounding, their neighbours down."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_llm.calibrate import LayerWeights, Statistics, Wants, inputs
from jaxopt_llm.kernels import Format, Weight, quantization_format
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.quantize.clipping import grid, output_error, round_on
from jaxopt_llm.quantize.folds import Fold, floats, folds

_STRENGTHS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ:
    """Scales folded into neighbours, then rounding to nearest in a narrower range.

    Attributes:
      format: a name that `quantization_format` knows.
      clip: groups may span less than their range, where that costs the outputs less.
      round: round the products; without, the layer computes what it did, ready for another method.
    """

    format: str = "int4_g64_zero"
    clip: bool = True
    round: bool = True

    def __post_init__(self):
        quantization_format(self.format)

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        every = tuple(name for names in inputs(config, layer) for name in names)
        return (Wants(products=every, gram=True),)

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, Weight]:
        form = quantization_format(self.format)
        for product in statistics:
            form.check(weights[f"{product}.weight"].shape[-1], f"layers.{layer}.{product}.weight")
        changed = dict(weights)
        grams = {product: found.moments for product, found in statistics.items()}
        for fold in folds(config, layer):
            found = statistics[fold.products[0]]
            mean = fold.pool(found.mean_abs, jnp.mean)
            read = [floats(changed[f"{name}.weight"]) for name in fold.products]
            scale = awq_scale(read, mean, found.moments, fold=fold, format=form)
            changed |= fold.apply(changed, scale)
            columns = fold.spread(scale)
            grams |= dict.fromkeys(fold.products, found.moments / (columns[:, None] * columns[None]))
        if self.round:
            for product, gram in grams.items():
                w = floats(changed[f"{product}.weight"])
                changed[f"{product}.weight"] = round_on(
                    w, *grid(w, gram, format=form, clip=self.clip), format=form
                )
        return changed


@functools.partial(jax.jit, static_argnames=("fold", "format"))
def awq_scale(
    weights: Sequence[Float[Array, "_ I"]],
    mean: Float[Array, "C"],
    gram: Float[Array, "I I"],
    *,
    fold: Fold,
    format: Format,
) -> Float[Array, "C"]:
    """The scale of each channel, `mean**a`, whose rounding changes the outputs least (equations 4 and 5).

    Args:
      weights: of the products that read the channels.
      mean: mean |x| of each channel; `a` goes over 20 steps from 0.
      gram: `X.T @ X` of the inputs.
      fold: channels to columns.
      format: to round to.
    """

    def scale(strength: Array) -> Float[Array, "C"]:
        powered = jnp.maximum(mean, 1e-4 * mean.max()) ** strength
        return powered / jnp.sqrt(powered.max() * powered.min())

    def loss(strength: Array) -> Array:
        columns = fold.spread(scale(strength))[None]
        rounded = [format.quantize(w * columns).dequantize() / columns for w in weights]
        return jnp.asarray(
            [output_error(new - w, gram) for new, w in zip(rounded, weights, strict=True)]
        ).sum()

    strengths = jnp.arange(_STRENGTHS, dtype=jnp.float32) / _STRENGTHS
    return scale(strengths[jax.lax.map(loss, strengths).argmin()])
