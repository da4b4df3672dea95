"""GPTQ (arXiv:2210.17323): columns are rounded one after another, and later ones make up for the error of earlier."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxopt_llm.calibrate import MOST_DAMPING, LayerWeights, Statistics, Wants, inputs, inverse_factor
from jaxopt_llm.kernels import Format, QArray, quantization_format
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.quantize.clipping import decode, grid
from jaxopt_llm.quantize.folds import floats

_BLOCK = 128  # columns whose errors reach the later ones at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Rounds the products of a layer so that their outputs change least: q, k and v; o; gate and up; down.

    Each of the four sees what the rounded ones before it give.

    Attributes:
      format: a name that `quantization_format` knows.
      damping: added to the diagonal of the second moments, as a share of its mean; ten times as much where they
        cannot be factorised, up to 1.
      act_order: columns of the largest inputs first; groups stay where they are, their scales are fixed before.
      clip: groups may span less than their range, where rounding to nearest then costs less.
    """

    format: str = "int4_g64_zero"
    damping: float = 0.01
    act_order: bool = True
    clip: bool = True

    def __post_init__(self):
        quantization_format(self.format)
        if not 0 < self.damping <= MOST_DAMPING:
            raise ValueError(f"damping={self.damping} must be above 0 and at most {MOST_DAMPING}")

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return tuple(Wants(products=names, gram=True) for names in inputs(config, layer))

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, QArray]:
        form, rounded = quantization_format(self.format), {}
        for product, found in statistics.items():
            name = f"{product}.weight"
            form.check(weights[name].shape[-1], f"layers.{layer}.{name}")
            rounded[name] = gptq(
                floats(weights[name]),
                found.moments,
                form,
                damping=self.damping,
                act_order=self.act_order,
                clip=self.clip,
            )
        return rounded


def gptq(
    w: Float[Array, "O I"],
    gram: Float[Array, "I I"],
    format: Format,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    clip: bool = True,
) -> QArray:
    """A weight rounded so that `X @ w.T` changes least.

    Args:
      w: float32.
      gram: `X.T @ X` of the inputs.
      format: of the result.
      damping, act_order, clip: as `GPTQ` has them.

    Raises:
      ValueError: if the second moments cannot be factorised even with a damping of 1: they are no numbers.

    A feature that was never seen is rounded to nearest and bears no error of others.
    """
    scale, bias = grid(w, gram, format=format, clip=clip)
    diagonal = jnp.diagonal(gram)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(len(diagonal))
    factor = inverse_factor(gram[order][:, order], damping)
    codes = _round_in_order(w, factor, order, scale, bias, format=format)
    return format.assemble(codes, scale, bias)


@functools.partial(jax.jit, static_argnames="format")
def _round_in_order(
    w: Float[Array, "O I"],
    factor: Float[Array, "I I"],
    order: Int[Array, "I"],
    scale: Float[Array, "O G"],
    bias: Float[Array, "O G"] | None,
    *,
    format: Format,
) -> Shaped[Array, "O I"]:
    """Codes, not packed. Columns are held as rows, in the order in which they are rounded."""
    features = w.shape[1]
    group = order // (features // scale.shape[1])
    block = next(size for size in range(min(_BLOCK, features), 0, -1) if features % size == 0)
    grids = (scale.T[group], None if bias is None else bias.T[group])
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (factor, grids))

    def round_block(columns: Array, part: tuple[Any, ...]) -> tuple[Array, Array]:
        start, factor, grids = part
        own = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        mine = jax.lax.dynamic_slice_in_dim(columns, start, block)
        _, (codes, errors) = jax.lax.scan(round_column, mine, (jnp.arange(block), own, grids))
        # Left of the block the factor is zero, so that columns already rounded stay as they are.
        spread = jnp.matmul(factor.T, errors, precision=jax.lax.Precision.HIGHEST)
        return columns - spread, codes

    def round_column(columns: Array, part: tuple[Any, ...]) -> tuple[Array, tuple[Array, Array]]:
        j, factor, (scale, bias) = part
        codes = format.encode(columns[j], scale, bias)
        error = (columns[j] - decode(codes, scale, bias)) / factor[j]
        return columns - factor[:, None] * error[None], (codes, error)

    starts = jnp.arange(0, features, block)
    _, codes = jax.lax.scan(round_block, w.T[order], (starts, *blocks))
    return codes.reshape(features, -1)[jnp.argsort(order)].T
