"""A model with zeros among its weights, layer by layer."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.calibrate import LayerWeights, Statistics, Wants, inputs, walk
from jaxopt_llm.models import ModelConfig, Transformer, with_weights
from jaxopt_llm.prune import sparse
from jaxopt_llm.prune.sparsity import Sparsity
from jaxopt_llm.prune.surgery import float_weights

SparseMethod = Literal["magnitude", "wanda", "sparsegpt"]
CALIBRATED = ("wanda", "sparsegpt")  # methods that need a text


def sparsify(
    model: Transformer,
    sparsity: float | str,
    method: SparseMethod = "sparsegpt",
    *,
    ids: Int[np.ndarray, "N T"] | None = None,
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """A copy of a model with zeros among the weights of its layers; embedding and head stay dense.

    It has as many bytes as before and runs as fast: only kernels for sparse weights would gain by the zeros.

    Args:
      model: with float weights and no experts.
      sparsity: share of zeros, such as 0.5, or how many of each group stay, such as `"2:4"`.
      method: `magnitude` zeroes the smallest of each matrix; `wanda` those that matter least to each output
        (arXiv:2306.11695); `sparsegpt` those that cost least, and makes up for them with the others (arXiv:2301.00774).
      ids: calibration text, N sequences of T tokens, for the latter two.
      directory: where finished layers are kept, so that an interrupted run goes on (see `calibrate.walk`).
      progress: called with (layers done, of all).

    Raises:
      ValueError: for another sparsity or method, quantized weights, experts, rows that groups do not divide, or a
        missing or unfit calibration text.
    """
    wanted, config = Sparsity.parse(sparsity), model.config
    _check(model, wanted, method, ids)
    if method == "magnitude":
        values = float_weights(model)
        names = [f"layers.{i}.{name}" for i in range(config.num_layers) for name in _products(config, i)]
        changed = _changed(values, names, lambda _, w: sparse.magnitude(w, wanted))
        return with_weights(model, changed)
    assert ids is not None
    chosen = Wanda(sparsity=wanted) if method == "wanda" else SparseGPT(sparsity=wanted)
    return walk(model, ids, [chosen], directory=directory, progress=progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda:
    """`sparse.wanda` for each layer: q, k and v; o; gate and up; down each see what the sparse before them give.

    In the paper (arXiv:2306.11695) all products of a layer see what its dense ones give: SmolLM2's perplexity goes from
    23.24 to 50.86 so, where half of the weights go, and to 50.49 here.
    """

    sparsity: Sparsity

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return tuple(Wants(products=names) for names in inputs(config, layer))

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, Array]:
        change = lambda name, w: sparse.wanda(w, statistics[name].norm, self.sparsity)
        return _changed(weights, statistics, change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT:
    """`sparse.sparsegpt` for each layer, whose products see what those of `Wanda` do."""

    sparsity: Sparsity
    damping: float = 0.01

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return tuple(Wants(products=names, gram=True) for names in inputs(config, layer))

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, Array]:
        def change(name: str, w: Float[Array, "O I"]) -> Float[Array, "O I"]:
            gram = statistics[name].gram
            assert gram is not None, "it is wanted"
            return sparse.sparsegpt(w, gram, self.sparsity, damping=self.damping)

        return _changed(weights, statistics, change)


def _products(config: ModelConfig, layer: int) -> tuple[str, ...]:
    return tuple(name for together in inputs(config, layer) for name in together)


def _changed(
    weights: LayerWeights, products: Iterable[str], change: Callable[[str, Array], Array]
) -> dict[str, Array]:
    """The weights of products after a change, computed in float32."""
    changed = {}
    for product in products:
        w = weights[f"{product}.weight"]
        assert isinstance(w, Array), "no weight is quantized: it was checked"
        changed[f"{product}.weight"] = change(product, w.astype(jnp.float32)).astype(w.dtype)
    return changed


def _check(model: Transformer, sparsity: Sparsity, method: str, ids: Int[np.ndarray, "N T"] | None) -> None:
    config, values = model.config, float_weights(model)
    if method not in get_args(SparseMethod):
        raise ValueError(f"{method=} must be one of {', '.join(get_args(SparseMethod))}")
    if config.experts:
        raise ValueError(
            f"{config.family} has experts, whose inputs are not observed; its weights stay dense"
        )
    if method in CALIBRATED and ids is None:
        raise ValueError(f"{method=} needs a calibration text; give ids, or take method='magnitude'")
    for layer in range(config.num_layers):
        for product in _products(config, layer):
            name = f"layers.{layer}.{product}.weight"
            sparsity.check(values[name].shape[-1], name)
