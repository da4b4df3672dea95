"""Weights to zeros where they lie: by magnitude, Wanda, SparseGPT."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopt_llm.calibrate import inverse_factor
from jaxopt_llm.prune.sparsity import Sparsity

_BLOCK = 128  # columns whose errors reach the later ones at once


@functools.partial(jax.jit, static_argnames="sparsity")
def magnitude(w: Float[Array, "O I"], sparsity: Sparsity) -> Float[Array, "O I"]:
    """The weights, the smallest of the matrix zero; of each group, where there are groups."""
    return jnp.where(sparsity.gone(jnp.abs(w), rows=False), 0, w)


@functools.partial(jax.jit, static_argnames="sparsity")
def wanda(w: Float[Array, "O I"], norm: Float[Array, "I"], sparsity: Sparsity) -> Float[Array, "O I"]:
    """The weights, those of each output zero that matter least to it (Wanda, arXiv:2306.11695).

    Args:
      w: float32.
      norm: of each feature over all tokens.
      sparsity: of each row, or of each group in it.
    """
    return jnp.where(sparsity.gone(jnp.abs(w) * norm[None], rows=True), 0, w)


def sparsegpt(
    w: Float[Array, "O I"], gram: Float[Array, "I I"], sparsity: Sparsity, *, damping: float = 0.01
) -> Float[Array, "O I"]:
    """The weights, those zero that cost least, the others changed to make up for them (arXiv:2301.00774).

    Args:
      w: float32.
      gram: second moments of the inputs, `X.T @ X`.
      sparsity: of each block of 128 columns, or of each group.
      damping: as `inverse_factor` has it.

    Raises:
      ValueError: if the second moments cannot be factorised.
    """
    return _column_by_column(w, inverse_factor(gram, damping), sparsity)


@functools.partial(jax.jit, static_argnames="sparsity")
def _column_by_column(
    w: Float[Array, "O I"], factor: Float[Array, "I I"], sparsity: Sparsity
) -> Float[Array, "O I"]:
    """In blocks of columns, which are held as rows."""
    size = _BLOCK - _BLOCK % (sparsity.group or 1)
    whole, rest = divmod(w.shape[1], size)
    block = functools.partial(_block, factor=factor, sparsity=sparsity)
    columns = w.T
    if whole:
        columns = jax.lax.fori_loop(0, whole, lambda i, columns: block(columns, i * size, size=size), columns)
    if rest:
        columns = block(columns, whole * size, size=rest)
    return columns.T


def _block(
    columns: Float[Array, "I O"],
    start: int | Array,
    *,
    size: int,
    factor: Float[Array, "I I"],
    sparsity: Sparsity,
) -> Float[Array, "I O"]:
    """All columns after `size` of them, from `start` on, have got their zeros."""
    rows = jax.lax.dynamic_slice_in_dim(factor, start, size)  # zero left of the block
    own = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    mine = jax.lax.dynamic_slice_in_dim(columns, start, size)
    scale = jnp.diagonal(own)[:, None]
    cost = lambda columns, scale: jnp.square(columns / scale)

    def choose(columns: Array, gone: Array, j: Array) -> Array:
        """Where a group begins, its zeros are chosen from what the columns before have made of it."""
        assert sparsity.group
        here = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=j, slice_size=sparsity.group)
        found = sparsity.gone(cost(here(columns), here(scale)).T, rows=True).T
        return jax.lax.dynamic_update_slice_in_dim(gone, found, j, axis=0)

    def column(carry: tuple[Array, Bool[Array, "b O"]], part: tuple[Array, Array]) -> tuple[tuple, tuple]:
        (columns, gone), (j, row) = carry, part
        if sparsity.group:
            gone = jax.lax.cond(j % sparsity.group == 0, choose, lambda _, gone, __: gone, columns, gone, j)
        value = jnp.where(gone[j], 0, columns[j])
        error = (columns[j] - value) / row[j]
        return (columns - row[:, None] * error[None], gone), (value, error)

    if sparsity.group:
        gone = jnp.zeros(mine.shape, bool)
    else:
        gone = sparsity.gone(cost(mine, scale), rows=False)
    _, (values, errors) = jax.lax.scan(column, (mine, gone), (jnp.arange(size), own))
    spread = jnp.matmul(rows.T, errors, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.dynamic_update_slice_in_dim(columns - spread, values, start, axis=0)
