"""`Statistics` of what goes into the products of a layer."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_llm.models import ModelConfig
from jaxopt_llm.models.captured import tap

INPUTS = (
    ("attention.q", "attention.k", "attention.v"),
    ("attention.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)
"""The products of a layer in the order of the forward; those that stand together have one input."""

_SOURCE = {name: together[0] for together in INPUTS for name in together}


def inputs(config: ModelConfig, layer: int) -> tuple[tuple[str, ...], ...]:
    """Those of `INPUTS` that a layer has. Experts see rows sorted by expert, which are not observed."""
    return tuple(names for names in INPUTS if "mlp" not in names[0] or not config.has_experts(layer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wants:
    """What a method asks one pass over the text for.

    Attributes:
      products: whose inputs to observe, by their names in the layer, such as `attention.q`.
      gram: whether their second moments are wanted, `[I, I]`.
    """

    products: tuple[str, ...]
    gram: bool = False

    def __post_init__(self):
        unknown = [name for name in self.products if name not in _SOURCE]
        if unknown or not self.products:
            known = ", ".join(_SOURCE)
            raise ValueError(f"products={self.products} must name at least one of {known}, and nothing else")

    @property
    def sources(self) -> tuple[str, ...]:
        """One product of each input."""
        return tuple(dict.fromkeys(_SOURCE[name] for name in self.products))

    def share(self, found: Mapping[str, "Statistics"]) -> dict[str, "Statistics"]:
        """What was found of each of `sources`, under the name of each product."""
        return {name: found[_SOURCE[name]] for name in self.products}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the input of a product over all tokens, float32; those of two texts add up.

    Attributes:
      count: tokens.
      sum_abs, sum_square: of each feature over the tokens.
      max_abs: of each feature.
      gram: `X.T @ X` of the inputs `X[T, I]`; None where it was not wanted.
    """

    count: Float[Array, ""]
    sum_abs: Float[Array, "I"]
    sum_square: Float[Array, "I"]
    max_abs: Float[Array, "I"]
    gram: Float[Array, "I I"] | None

    @classmethod
    def of(cls, x: Float[Array, "*B I"], *, gram: bool) -> Self:
        """Those of inputs."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        size = jnp.abs(rows)
        return cls(
            count=jnp.asarray(rows.shape[0], jnp.float32),
            sum_abs=size.sum(0),
            sum_square=(rows * rows).sum(0),
            max_abs=size.max(0),
            gram=jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST) if gram else None,
        )

    def __add__(self, other: Self) -> Self:
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, max_abs=jnp.maximum(self.max_abs, other.max_abs))

    @property
    def mean_abs(self) -> Float[Array, "I"]:
        """Mean |x| of each feature."""
        return self.sum_abs / self.count

    @property
    def norm(self) -> Float[Array, "I"]:
        """The norm of each feature over all tokens, `sqrt(sum x**2)`."""
        return jnp.sqrt(self.sum_square)

    @property
    def moments(self) -> Float[Array, "I I"]:
        """`gram`, of a method that wanted it."""
        assert self.gram is not None, "a method asks for what it reads"
        return self.gram

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(self))


def watch(layer: Any, wants: Wants) -> dict[str, Statistics]:
    """Where the statistics of a layer's inputs appear, by source, once the layer has been called."""
    seen: dict[str, Statistics] = {}
    for name in wants.sources:
        part, _, product = name.partition(".")
        tap(getattr(getattr(layer, part), product), functools.partial(_observe, name, wants.gram, seen))
    return seen


def _observe(name: str, gram: bool, seen: dict[str, Statistics], x: Array, out: Array) -> Array:
    seen[name] = Statistics.of(x, gram=gram)
    return out
