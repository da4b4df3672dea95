"""Products grouped by expert, as a call of JAX's megablox kernel (arXiv:2211.15841)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROWS, _LANES, _WIDEST = 128, 128, 1024  # of a tile; the kernel wants whole tiles of rows


def megablox(x: Float[Array, "M I"], w: Float[Array, "E O I"], sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
    """`grouped_linear` of float weights."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    rows, (_, outputs, inputs) = x.shape[0], w.shape
    height = min(_ROWS, _whole(rows, 8 * 4 // x.dtype.itemsize))
    padded = jnp.pad(x, ((0, _whole(rows, height) - rows), (0, 0)))
    wide = lambda size: min(_WIDEST, _whole(size, _LANES))
    tiles = (height, wide(inputs), wide(outputs))
    return gmm(padded, w.astype(x.dtype), sizes.astype(jnp.int32), x.dtype, tiles, transpose_rhs=True)[:rows]


def _whole(size: int, unit: int) -> int:
    """The next multiple."""
    return -(-size // unit) * unit
