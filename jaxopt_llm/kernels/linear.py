"""Products with plain or quantized weights: the `jax.numpy` definition."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.cpu.panels import Panels
from jaxopt_llm.kernels.cpu.product import product
from jaxopt_llm.kernels.norm import per_feature, rms_norm
from jaxopt_llm.kernels.packed import Packed
from jaxopt_llm.kernels.qarray import QArray, Weight, round_symmetric

_GATES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def linear(x: Float[Array, "*B I"], w: Weight | Packed) -> Float[Array, "*B O"]:
    """`x @ w.T` for a plain or quantized weight, or what `pack` made of some.

    Args:
      x: activations, any float dtype; the result has the same dtype.
      w: weight `[O, I]`, one row per output. A `QArray` with `act=(8, 32)` also rounds `x` to int8,
        symmetric, one scale every 32 features, so that the product can run on integer units.

    Raises:
      ValueError: if the inner dimensions differ.

    Gradients reach `x` as if nothing had been rounded (straight-through, arXiv:1308.3432); a quantized
    weight gets none. A packed weight has no gradients.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} input features but w has {w.shape[-1]}")
    if isinstance(w, Packed):
        return _packed_linear(x, w)
    if isinstance(w, QArray):
        return _quantized_linear(x, w)
    return _dot(x, w.astype(x.dtype))


def embed(ids: Int[Array, "*B"], w: Weight | Packed, dtype: jnp.dtype) -> Float[Array, "*B D"]:
    """Rows `ids` of a plain, quantized or packed table `[V, D]`, as `dtype`: the weights alone, no norm, no bias.

    Raises:
      ValueError: if several weights were packed together.
    """
    if isinstance(w, Packed):
        return _packed_rows(ids, w, dtype)
    rows = w[ids]
    return rows.dequantize(dtype) if isinstance(rows, QArray) else rows.astype(dtype)


def _packed_rows(ids: Array, w: Packed, dtype: jnp.dtype) -> Array:
    if isinstance(w.weight, Panels):
        return w.weight.dequantize_rows(ids, dtype)
    if len(w.weight) > 1:
        raise ValueError(f"a table is one weight, but {len(w.weight)} were packed together")
    return embed(ids, w.weight[0], dtype)


def _packed_linear(x: Array, w: Packed) -> Array:
    if not isinstance(w.weight, Panels):
        return unfused(x, w, w.weight, linear)
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, w.weight, bias=w.bias, gain=w.gain, eps=w.eps, gate=w.gate)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def unfused(
    x: Float[Array, "*B I"],
    w: Packed,
    weights: Sequence[Weight],
    product: Callable[[Array, Weight], Array],
    expert: Int[Array, "*B"] | None = None,
) -> Float[Array, "*B O"]:
    """What a kernel computes, one operation after another; `expert` is each row's where there are experts."""
    if w.gain is not None:
        x = rms_norm(x, w.gain, eps=w.eps)
    y = jnp.concatenate([product(x, part) for part in weights], axis=-1)
    if w.bias is not None:
        bias = per_feature(w.bias, y) if expert is None else w.bias[expert]
        y = y + bias.astype(y.dtype)
    if w.gate is None:
        return y
    gate, up = jnp.split(y, 2, axis=-1)
    return _GATES[w.gate](gate) * up


def _dot(x: Array, w: Array, dtype: jnp.dtype | None = None) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _per_channel(w: QArray) -> bool:
    return w.scale.shape[-1] == 1 and w.bias is None


def round_activations(x: Float[Array, "*B I"], act: tuple[int, int] | None) -> Float[Array, "*B I"]:
    """`x` rounded as `QArray.act` says (bits, group); `x` itself for None."""
    if act is None:
        return x
    bits, group = act
    codes, scale = round_symmetric(x, bits=bits, group=group)
    values = codes.reshape(*scale.shape, group).astype(jnp.float32) * scale[..., None]
    return values.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _quantized_linear(x: Array, w: QArray) -> Array:
    x = round_activations(x, w.act)
    if _per_channel(w):  # the scale follows the sum: no dequantized copy of the weight
        y = _dot(x, w.codes().astype(x.dtype), jnp.float32)  # sums of codes outgrow float16
        return (y * per_feature(w.scale[:, 0].astype(jnp.float32), y)).astype(x.dtype)
    return _dot(x, w.dequantize(x.dtype))


def _forward(x: Array, w: QArray) -> tuple[Array, QArray]:
    return _quantized_linear(x, w), w


def _backward(w: QArray, dy: Array) -> tuple[Array, QArray]:
    return jnp.einsum("...o,oi->...i", dy, w.dequantize(dy.dtype)), _zero_cotangent(w)


def _zero_cotangent(w: QArray) -> QArray:
    """Zeros of the tangent types: `float0` for codes."""
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype if is_float(a) else jax.dtypes.float0), w)


_quantized_linear.defvjp(_forward, _backward)
