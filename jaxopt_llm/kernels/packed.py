"""Weights as a platform's kernels want them, fused with their neighbours."""

import dataclasses
import functools
import itertools
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
      parts: whose outputs follow one another: panels for the CPU kernels, or a weight where there is no kernel.
      biases: of each part, or none; in panels where the part is.
      gain: of the norm before the product.
      eps: of that norm.
      gate: the activation of the first half, which the second half is multiplied with.
    """

    parts: tuple[Panels | Any, ...]
    biases: tuple[Any, ...]
    gain: Any = None
    eps: float = dataclasses.field(default=0.0, metadata={"static": True})
    gate: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, if there are any, features of the result and of the input."""
        *experts, _, features = self.parts[0].shape
        rows = sum(part.shape[-2] for part in self.parts)
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
    has_kernels = (platform or jax.default_backend()) == "cpu" and library.load() is not None
    form_of = panels.form if has_kernels else lambda _: None
    runs = [(form, list(run)) for form, run in itertools.groupby(weights, form_of)]
    paired = gate is not None and len(runs) == 1  # a kernel's gate takes panels of both halves
    parts: list[Panels | Weight] = []
    for form, run in runs:
        parts += run if form is None else [panels.pack(run, paired=paired)]
    return Packed(parts=tuple(parts), biases=_biases(bias, parts), gain=gain, eps=eps, gate=gate)


def _biases(bias: Array | None, parts: Sequence[Panels | Weight]) -> tuple[Array | None, ...]:
    """Each part's own, in panels where the part is."""
    if bias is None:
        return (None,) * len(parts)
    borders = list(itertools.accumulate(part.shape[-2] for part in parts))[:-1]
    return tuple(
        _in_panels(own.astype(jnp.float32), part) if isinstance(part, Panels) else own
        for own, part in zip(jnp.split(bias, borders, axis=-1), parts, strict=True)
    )


def _in_panels(bias: Array, part: Panels) -> Array:
    halves = jnp.split(bias, 2 if part.paired else 1, axis=-1)
    arrange = functools.partial(panels.arrange, paired=part.paired)
    return arrange(halves) if bias.ndim == 1 else jax.vmap(arrange)(halves)


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
