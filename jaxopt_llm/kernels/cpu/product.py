"""The product with panels, as a call of the C++ kernel."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.cpu.panels import ROUND_BLOCKS, Panels

GATES = ("silu", "gelu", "gelu_tanh")  # as `enum class Gate` after kNone


def product(
    x: Float[Array, "*M I"],
    w: Panels,
    *,
    bias: Float[Array, "*E panels 16"] | None = None,
    gain: Float[Array, "I"] | None = None,
    eps: float = 0.0,
    gate: str | None = None,
    sizes: Int[Array, "E"] | None = None,
) -> Float[Array, "*M O"]:
    """`norm(x) @ w.T + bias`, or with `gate` the activated first half of that times the second.

    With `sizes`, weights and bias are those of experts, rows of `x` are sorted by expert and `sizes[e]` of them belong
    to expert `e`, all in all M. Only experts in use are read.

    Raises:
      ValueError: if only one of weights and rows knows of experts.

    A row of the result has the same bits whatever rows stand beside it and however many threads work. Where activations
    are not rounded, it is as exact as a product in float32, but for this: with AVX-512 an input is lost up to
    2^-24 of the largest of its run, 512 inputs at most and no more than share a scale of the weights.
    """
    if (len(w.shape) == 3) != (sizes is not None):
        raise ValueError(
            f"weights of shape {w.shape} {'with' if sizes is not None else 'without'} sizes of experts"
        )
    library.load()
    outputs = w.rows if gate is None else w.rows // 2
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    call = jax.ffi.ffi_call("jaxopt_linear", jax.ShapeDtypeStruct((rows.shape[0], outputs), jnp.float32))
    y = call(
        rows,
        w.codes,
        w.scale,
        _or_empty(w.minimum),
        _or_empty(bias),
        _or_empty(gain),
        jnp.zeros(0, jnp.int32) if sizes is None else sizes.astype(jnp.int32),
        eps=np.float32(eps),
        bits=np.int32(w.bits),
        round=w.act == ROUND_BLOCKS,
        gate=np.int32(0 if gate is None else 1 + GATES.index(gate)),
    )
    return y.reshape(*x.shape[:-1], outputs).astype(x.dtype)


def _or_empty(a: Array | None) -> Array:
    return jnp.zeros(0) if a is None else a
