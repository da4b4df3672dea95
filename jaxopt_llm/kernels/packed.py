"""Weights as a platform's kernels want them, fused with their neighbours."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_llm.kernels.cpu import library, panels
from jaxopt_llm.kernels.cpu.panels import Panels
from jaxopt_llm.kernels.cpu.product import GATES
from jaxopt_llm.kernels.qarray import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A fused product, made by `pack` and understood by `linear`, `grouped_linear` and `embed` alone.

    Attributes:
      weight: panels for the CPU kernels, or the weights themselves where there is no kernel.
      bias: added to the product; in panels where the weight is.
      gain: of the norm before the product.
      eps: of that norm.
      gate: the activation of the first half, which the second half is multiplied with.
    """

    weight: Panels | tuple[Any, ...]
    bias: Any = None
    gain: Any = None
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})
    gate: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, if there are any, features of the result and of the input."""
        if isinstance(self.weight, Panels):
            *experts, rows, features = self.weight.shape
        else:
            *experts, rows, features = self.weight[0].shape
            rows = sum(w.shape[-2] for w in self.weight)
        return *experts, (rows if self.gate is None else rows // 2), features

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def pack(
    weights: Sequence[Weight],
    *,
    bias: Float[Array, "*E O"] | None = None,
    norm: tuple[Float[Array, "I"], float] | None = None,
    gate: str | None = None,
    platform: str | None = None,
) -> Packed:
    """Weights of one input, as `linear` runs them fastest. Also inside a `shard_map`, on local shapes.

    Args:
      weights: `[O, I]` each; their outputs follow one another. With experts `[E, O, I]`, for `grouped_linear`.
      bias: of all outputs, added to the product.
      norm: gain and epsilon of an `rms_norm` that the input goes through first.
      gate: takes two weights of equal shape, and gives `gate(first) * second`.
      platform: where it will run; that of the default devices if None.

    Raises:
      ValueError: if the shapes do not go together or the gate is unknown.
    """
    _check(weights, gate)
    gain, eps = (None, 0.0) if norm is None else (norm[0].astype(jnp.float32), norm[1])
    platform = platform or jax.default_backend()
    if platform != "cpu" or library.load() is None or not panels.fits(weights):
        return Packed(weight=tuple(weights), bias=bias, gain=gain, eps=eps, gate=gate)
    if bias is not None:
        halves = jnp.split(bias.astype(jnp.float32), 2 if gate else 1, axis=-1)
        arrange = functools.partial(panels.arrange, paired=gate is not None)
        bias = arrange(halves) if bias.ndim == 1 else jax.vmap(arrange)(halves)
    return Packed(
        weight=panels.pack(weights, paired=gate is not None), bias=bias, gain=gain, eps=eps, gate=gate
    )


def _check(weights: Sequence[Weight], gate: str | None) -> None:
    shapes = [w.shape for w in weights]
    if len({(*shape[:-2], shape[-1]) for shape in shapes}) != 1:
        raise ValueError(f"packed weights need one input, but their shapes are {shapes}")
    if gate is None:
        return
    if gate not in GATES:
        raise ValueError(f"{gate=} is unknown; known are {', '.join(GATES)}")
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"a gate takes two weights of equal shape, not {shapes}")
