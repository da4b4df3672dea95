"""Mixture of experts: products grouped by expert.

Letters: T tokens, k experts a token, E experts, F expert width, D model width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.linear import fused, linear, round_activations
from jaxopt_llm.kernels.packed import Packed
from jaxopt_llm.kernels.qarray import QArray, Weight
from jaxopt_llm.kernels.tpu import megablox

_ROWS = 32  # rows of one expert that are multiplied together on the CPU


def grouped_linear(x: Float[Array, "M I"], w: Weight | Packed, sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
    """`x[m] @ w[e].T` where rows are sorted by expert and `sizes[e]` of them belong to expert `e`.

    A packed weight runs in the platform's kernel (TPU: megablox, for floats). Others: TPU and GPU take
    `jax.lax.ragged_dot`. XLA:CPU makes that one dense pass an expert (32 times the work at 32 experts), so there
    the rows are cut into blocks of one expert each, and only blocks in use are multiplied.

    Args:
      x: rows, sorted by expert.
      w: weights `[E, O, I]`, or what `pack` made of some.
      sizes: rows of each expert; their sum is M.
    """
    if isinstance(w, Packed):
        return fused(x, w, lambda x, part: _grouped(x, part, sizes, kernel=True), sizes)
    return _grouped(x, w, sizes)


def _grouped(x: Array, w: Weight, sizes: Array, *, kernel: bool = False) -> Array:
    on_tpu = megablox if kernel and not isinstance(w, QArray) else _ragged
    return jax.lax.platform_dependent(x, w, sizes, cpu=_blocks, tpu=on_tpu, default=_ragged)


def _ragged(x: Array, w: Weight, sizes: Array) -> Array:
    if isinstance(w, QArray):
        x, floats = round_activations(x, w.act), w.dequantize(x.dtype)
    else:
        floats = w.astype(x.dtype)
    return jax.lax.ragged_dot(x, floats.swapaxes(1, 2), sizes)


def _blocks(x: Array, w: Weight, sizes: Array) -> Array:
    rows, experts = x.shape[0], w.shape[0]
    height = min(_ROWS, rows)
    count = min(rows, rows // height + experts)  # no more can be needed: each holds a row, all but E are full
    ends = jnp.cumsum(sizes)
    blocks_of = -(-sizes // height)
    block_ends = jnp.cumsum(blocks_of)
    index = jnp.arange(count)
    expert = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), experts - 1)
    first = (ends - sizes)[expert] + (index - (block_ends - blocks_of)[expert]) * height
    # Rows are read past the end of x and past the expert's own; both are dropped when written.
    place = first[:, None] + jnp.arange(height)[None, :]
    own = (place < ends[expert][:, None]) & (index < block_ends[-1])[:, None]

    def block(args: tuple[Array, Array, Array]) -> Array:
        used, which, at = args
        multiply = lambda: linear(x[jnp.minimum(at, rows - 1)], w[which])
        return jax.lax.cond(used, multiply, lambda: jnp.zeros((height, w.shape[1]), x.dtype))

    out = jax.lax.map(block, (index < block_ends[-1], expert, place))
    target = jnp.where(own, place, rows)
    return jnp.zeros((rows, w.shape[1]), x.dtype).at[target].set(out, mode="drop")


def moe(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    experts: Int[Array, "T k"],
    feed_forward: Callable[[Array, Array, Array], Array],
    num_experts: int,
    *,
    some: bool = False,
) -> Float[Array, "T D"]:
    """The weighted sum of what each token's experts give.

    Args:
      x: tokens.
      weights: share of each chosen expert.
      experts: which experts each token goes to.
      feed_forward: `(rows sorted by expert, expert of each row, rows of each expert) -> rows`, from
        `grouped_linear` products.
      num_experts: E.
      some: whether tokens may go to experts that are not among these, whose ids are below 0 or not below E: those give
        nothing here.
    """
    chosen = experts.reshape(-1)
    if some:
        chosen = jnp.where((chosen < 0) | (chosen >= num_experts), num_experts, chosen)
    order = jnp.argsort(chosen, stable=True)
    token = order // experts.shape[1]
    sizes = jnp.bincount(chosen, length=num_experts)
    out = feed_forward(x[token], chosen[order], sizes)
    if some:  # what kernels leave there may be anything
        out = jnp.where((jnp.arange(len(token)) < sizes.sum())[:, None], out, 0)
    out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
    return jnp.zeros_like(x).at[token].add(out)
