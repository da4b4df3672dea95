"""Attention over combined pages, as a call of JAX's ragged paged attention."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.pages import CombinedPages

_QUERIES, _KEYS, _PAGES = (
    32,
    512,
    16,
)  # of a block, at most: what the kernel's table of tuned sizes has most often


def attend(
    q: Float[Array, "T N H"],
    pages: CombinedPages,
    *,
    heads: int,
    slots: Int[Array, "T"],
    kv_len: Int[Array, "R"],
    query_start: Int[Array, "R1"],
    num_slots: Int[Array, ""],
    table: Int[Array, "R P"],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "T N H"]:
    """Attends to pages that hold the batch's own keys and values already. Padding gives zeros.

    Args:
      q: queries, the tokens of a slot one after another, slots in order.
      pages: made by `init_pages`, written by `write`.
      heads: K, of which the pages may hold more.
      slots: of each token; R for padding.
      kv_len, query_start, num_slots, table: as `Rows` has them.
      scale, window, softcap: as `AttentionSpec` has them.
    """
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    # Where there is no slot the kernel would start a copy that it never waits for.
    query_start = jnp.where(num_slots == 0, jnp.minimum(jnp.arange(query_start.shape[0]), 1), query_start)
    kv_len, num_slots = jnp.maximum(kv_len, 1), jnp.maximum(num_slots, 1)
    page_size = pages.kv[0].shape[1]
    if window is not None:
        kv_len, table = _seen(kv_len, query_start, table, window, page_size, q.shape[0])
    run = functools.partial(
        ragged_paged_attention,
        kv_lens=kv_len.astype(jnp.int32),
        page_indices=table.astype(jnp.int32),
        cu_q_lens=query_start.astype(jnp.int32),
        num_seqs=num_slots.astype(jnp.int32).reshape(1),
        sm_scale=scale,
        sliding_window=window,
        soft_cap=softcap,
        num_kv_pages_per_block=min(table.shape[1], _PAGES, max(1, _KEYS // page_size)),
        num_queries_per_block=min(q.shape[0], _QUERIES),
    )
    outs = []
    for part, kv in zip(jnp.split(q, len(pages.kv), axis=1), pages.kv, strict=True):
        out = run(
            _padded(part, kv, heads // len(pages.kv)), pltpu.with_memory_space_constraint(kv, pltpu.HBM)
        )
        outs.append(out[:, : part.shape[1], : part.shape[2]])
    out = jnp.concatenate(outs, axis=1).astype(q.dtype)
    return jnp.where((slots < table.shape[0])[:, None, None], out, 0)


def _padded(
    q: Float[Array, "T N H"], kv: Float[Array, "pages page_size heads h"], heads: int
) -> Float[Array, "T n h"]:
    """As many queries a head of the pages as there are a real one, padding last; in the pages' width and dtype."""
    _, queries, width = q.shape
    more_heads, more_width = kv.shape[2] // 2 - heads, kv.shape[3] - width
    return jnp.pad(q, ((0, 0), (0, more_heads * (queries // heads)), (0, more_width))).astype(kv.dtype)


def _seen(
    kv_len: Int[Array, "R"],
    query_start: Int[Array, "R1"],
    table: Int[Array, "R P"],
    window: int,
    page_size: int,
    tokens: int,
) -> tuple[Int[Array, "R"], Int[Array, "R p"]]:
    """Lengths and pages without those before every window: the kernel would read them, and no slot owns them any more.

    Only differences of positions count, so a sequence may as well start at the first page that is seen.
    """
    first = kv_len - (query_start[1:] - query_start[:-1])  # query of each slot
    left_out = jnp.maximum(first - window + 1, 0) // page_size
    most = min(table.shape[1], -(-(window + tokens - 2) // page_size) + 1)
    place = jnp.minimum(left_out[:, None] + jnp.arange(most)[None, :], table.shape[1] - 1)
    return kv_len - left_out * page_size, jnp.take_along_axis(table, place, axis=1)
