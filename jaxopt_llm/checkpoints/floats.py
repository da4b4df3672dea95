"""A weight's values on the host, to be written."""

import jax
import numpy as np
from jaxtyping import Float

from jaxopt_llm.kernels import QArray, Weight

_CHUNK = 1 << 20  # bytes made at once


def to_floats(weight: Weight, dtype: np.dtype | None = None) -> Float[np.ndarray, "... I"]:
    """A plain or quantized weight as floats; a quantized one takes the result's memory and little more.

    Args:
      weight: on any devices.
      dtype: of the result; None for the weight's own, float32 where it is quantized.
    """
    if not isinstance(weight, QArray):
        return np.asarray(weight).astype(dtype or weight.dtype, copy=False)
    held, out = jax.tree.map(np.asarray, weight), np.empty(weight.shape, dtype or np.float32)
    rows = max(1, _CHUNK // max(1, out[:1].nbytes))
    for first in range(0, len(out), rows):  # on the host: XLA would hold a second copy now and then
        part = slice(first, first + rows)
        out[part] = held[part].dequantize(out.dtype)
    return out
