"""Quantization-aware training: products see weights as they will be stored, the optimizer those that it moves."""

import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from jaxopt_llm.kernels import Format, QArray
from jaxopt_llm.models import quantizable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def straight_through(format: Format, weight: Float[Array, "*E O I"]) -> Float[Array, "*E O I"]:
    """A weight rounded; its gradient is that of the rounded one (straight-through estimator, arXiv:1308.3432)."""
    return format.quantize(weight).dequantize(weight.dtype)


def _forward(format: Format, weight: Array) -> tuple[Array, None]:
    return straight_through(format, weight), None


def _backward(format: Format, _: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


straight_through.defvjp(_forward, _backward)


def rounded(format: Format, params: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters as they will be worth when they are stored, differentiable; those that stay floats as they are."""
    return {
        name: straight_through(format, value) if quantizable(name, value.shape) else value
        for name, value in params.items()
    }


def stored(format: Format, params: Mapping[str, Array]) -> dict[str, QArray]:
    """Of those that are rounded, the codes."""
    return {name: format.quantize(value) for name, value in params.items() if quantizable(name, value.shape)}


def check(format: Format, params: Mapping[str, Array]) -> None:
    """Raises ValueError if the format's groups do not divide a weight; the message names it."""
    for name, value in params.items():
        if quantizable(name, value.shape):
            format.check(value.shape[-1], name)
