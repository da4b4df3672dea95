"""Products with plain or quantized weights: the `jax.numpy` definition."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.cpu.panels import ROUND_ROWS, Panels
from jaxopt_llm.kernels.cpu.product import product
from jaxopt_llm.kernels.formats import round_symmetric
from jaxopt_llm.kernels.norm import per_feature, rms_norm
from jaxopt_llm.kernels.packed import Packed
from jaxopt_llm.kernels.qarray import Act, QArray, Weight

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
        symmetric, one scale every 32 features, so that the product can run on integer units; with `act=(8, None)`
        one scale a row (LLM.int8(), arXiv:2208.07339, section 2.1).

    Raises:
      ValueError: if the inner dimensions differ.

    Gradients reach `x` as if nothing had been rounded (straight-through, arXiv:1308.3432); a quantized
    weight gets none. A packed weight has no gradients.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} input features but w has {w.shape[-1]}")
    if isinstance(w, Packed):
        return fused(x, w, linear)
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
    if len(w.parts) > 1:
        raise ValueError(f"a table is one weight, but {len(w.parts)} were packed together")
    (table,) = w.parts
    return table.dequantize_rows(ids, dtype) if isinstance(table, Panels) else embed(ids, table, dtype)


def fused(
    x: Float[Array, "*B I"],
    w: Packed,
    multiply: Callable[[Array, Weight], Array],
    sizes: Int[Array, "E"] | None = None,
) -> Float[Array, "*B O"]:
    """What `pack` promises: one call for each part with a kernel, one operation after another for others.

    Args:
      x: activations; with `sizes` rows sorted by expert.
      w: what `pack` made.
      multiply: the product with a weight that has no kernel.
      sizes: rows of each expert, where there are experts.
    """
    gate = w.gate if len(w.parts) == 1 else None  # which one kernel applies
    outputs = []
    for part, bias in zip(w.parts, w.biases, strict=True):
        if isinstance(part, Panels):
            own, gain = x, w.gain
            if part.act == ROUND_ROWS:
                own, gain = round_activations(_normed(x, w, kernel=True), part.act), None
            y = product(own, part, bias=bias, gain=gain, eps=w.eps, gate=gate, sizes=sizes)
        else:
            y = multiply(_normed(x, w), part)
            if bias is not None:
                y = y + _spread(bias.astype(y.dtype), y, sizes)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=-1)
    if w.gate is None or gate is not None:
        return y
    first, second = jnp.split(y, 2, axis=-1)
    return _GATES[w.gate](first) * second


def _normed(x: Array, w: Packed, *, kernel: bool = False) -> Array:
    return x if w.gain is None else rms_norm(x, w.gain, eps=w.eps, kernel=kernel)


def _spread(bias: Array, y: Array, sizes: Array | None) -> Array:
    """The bias of each row."""
    if sizes is None:
        return per_feature(bias, y)
    return bias[jnp.repeat(jnp.arange(len(bias)), sizes, total_repeat_length=len(y))]


def _dot(x: Array, w: Array, dtype: jnp.dtype | None = None) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _per_channel(w: QArray) -> bool:
    return w.scale.shape[-1] == 1 and w.bias is None


def _integer(w: QArray) -> bool:
    """Whether a product is one sum of integers for each row and channel."""
    return _per_channel(w) and w.act == (8, None) and w.data.dtype == jnp.int8


def _integer_linear(x: Array, w: QArray) -> Array:
    codes, scale = round_symmetric(x, bits=8, group=x.shape[-1])
    y = jax.lax.platform_dependent(codes, w.data, cpu=sum_as_floats, default=sum_as_integers)
    return (y * scale * per_feature(w.scale[:, 0].astype(jnp.float32), y)).astype(x.dtype)


def sum_as_integers(x: Int[Array, "*B I"], w: Int[Array, "O I"]) -> Float[Array, "*B O"]:
    """Products of int8 codes on units made for them."""
    return _dot(x, w, jnp.int32).astype(jnp.float32)


def sum_as_floats(x: Int[Array, "*B I"], w: Int[Array, "O I"]) -> Float[Array, "*B O"]:
    """The same where XLA has no fast product of integers: exact up to 1,040 features, then as float32 sums are."""
    return _dot(x.astype(jnp.float32), w.astype(jnp.float32))


def round_activations(x: Float[Array, "*B I"], act: Act | None) -> Float[Array, "*B I"]:
    """`x` rounded as `QArray.act` says (bits, group); `x` itself for None."""
    if act is None:
        return x
    bits, group = act
    codes, scale = round_symmetric(x, bits=bits, group=group or x.shape[-1])
    values = codes.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
    return values.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _quantized_linear(x: Array, w: QArray) -> Array:
    if _integer(w):
        return _integer_linear(x, w)
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
