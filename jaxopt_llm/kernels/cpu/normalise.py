"""The root-mean-square norm, as a call of the C++ kernel."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxopt_llm.kernels.cpu import library

_LANES = 16


def fits(x: Float[Array, "*B D"]) -> bool:
    """Whether the kernel is there and knows this form."""
    known = x.dtype in (jnp.float32, jnp.bfloat16) and x.shape[-1] % _LANES == 0 and x.size > 0
    return known and library.load() is not None


def normalise(x: Float[Array, "*B D"], gain: Float[Array, "D"], *, eps: float) -> Float[Array, "*B D"]:
    """`rms_norm(x, gain)`, of what fits. A row has the same bits whatever rows stand beside it."""
    rows = x.reshape(-1, x.shape[-1])
    call = jax.ffi.ffi_call("jaxopt_rms_norm", jax.ShapeDtypeStruct(rows.shape, rows.dtype))
    return call(rows, gain.astype(jnp.float32), eps=np.float32(eps)).reshape(x.shape)
