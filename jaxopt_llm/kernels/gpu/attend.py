"""Attention over pages where they lie, in Pallas for Triton.

A program takes a block of one slot's queries, with all query heads of one key/value head, and walks over the keys that
they see with a running softmax (arXiv:2205.14135). Where slots are few, several programs share the keys of a block, and
what they give is merged (Flash-Decoding: pytorch.org/blog/flash-decoding).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.pages import Pages

_LEAST = 16  # of each side of a product on tensor cores
_ROWS = 64  # of a block, a query and a head each, unless one query has more heads
_TILE = 2**14  # bytes of the keys of a block, in the dtype of the queries
_PROGRAMS = 256  # keep a large GPU busy
_SHARE = 256  # keys that are worth a program of their own
_NOTHING = -1e30  # stands for the logarithm of 0; finite, so that differences are numbers


def attend(
    q: Float[Array, "T N H"],
    pages: Pages,
    *,
    slots: Int[Array, "T"],
    kv_len: Int[Array, "R"],
    query_start: Int[Array, "R1"],
    num_slots: Int[Array, ""],
    table: Int[Array, "R P"],
    sinks: Float[Array, "N"] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attends to pages that hold the batch's own keys and values already. Padding gives zeros.

    int8 codes are multiplied as they are; their scales go to the scores and to the weights of the softmax.

    Args:
      q: queries, the tokens of a slot one after another, slots in order.
      pages: made by `init_pages`, written by `write`.
      slots: of each token; R for padding.
      kv_len, query_start, num_slots, table: as `Rows` has them.
      sinks: as `attention` has them.
      scale, window, softcap: as `AttentionSpec` has them.
      interpret: run on whatever device there is, as a program of `jax.numpy`.
    """
    (tokens, heads, width), (_, page_size, kv_heads, _) = q.shape, pages.k.shape
    count, group = table.shape[0], heads // kv_heads
    filled = min(_ROWS, group * pl.cdiv(tokens, count))
    rows = pl.next_power_of_2(max(_LEAST, group, filled))
    queries = rows // group
    blocks = min(tokens, tokens // queries + count)  # no more can be needed: one a slot is not full
    columns = pl.next_power_of_2(max(_LEAST, width))
    keys = max(_LEAST, _TILE // (columns * q.dtype.itemsize))
    most = table.shape[1] * page_size
    seen = most if window is None else min(most, window + queries)
    splits = max(1, min(pl.cdiv(_PROGRAMS, blocks * kv_heads), seen // _SHARE))

    lengths = jnp.where(jnp.arange(count) < num_slots, query_start[1:] - query_start[:-1], 0)
    block_end = jnp.cumsum(-(-lengths // queries))  # of each slot
    ids = (a.astype(jnp.int32) for a in (table, kv_len, query_start, block_end))
    out, logsum = pl.pallas_call(
        functools.partial(
            _kernel, rows=rows, columns=columns, keys=keys, scale=scale, window=window, softcap=softcap
        ),
        grid=(kv_heads, splits, blocks),  # heads vary fastest: they share lines of memory
        out_shape=(
            jax.ShapeDtypeStruct((splits, *q.shape), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, tokens, heads), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(*ids, q, (pages.k, pages.k_scale), (pages.v, pages.v_scale), sinks)
    merged = out[0] if splits == 1 else (out * jax.nn.softmax(logsum, axis=0)[..., None]).sum(0)
    return jnp.where((slots < count)[:, None, None], merged.astype(q.dtype), 0)


def _kernel(
    table: Any, kv_len: Any, query_start: Any, block_end: Any, q: Any, k: Any, v: Any, sinks: Any,
    out: Any, logsum: Any,
    *, rows: int, columns: int, keys: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """One program. References to whole arrays, as `attend` passes them: `k` and `v` each with scales or None.

    Writes the softmax over its share of the keys, and the logarithm of the sum that it was divided by.
    """
    kv_head, split, block = (pl.program_id(axis) for axis in range(3))
    (_, page_size, kv_heads, width), count = k[0].shape, table.shape[0]
    group = q.shape[1] // kv_heads
    queries = rows // group

    # The queries. A block after the last one ends up past every slot, without any.
    each = jnp.arange(pl.next_power_of_2(count))
    ends = triton.load(block_end.at[each], mask=each < count, other=2**31 - 1)
    slot = (ends <= block).astype(jnp.int32).sum()
    first = query_start[slot] + (block - jnp.where(ends <= block, ends, 0).max()) * queries
    stop = query_start[jnp.minimum(slot + 1, count)]
    slot = jnp.minimum(slot, count - 1)
    row, column = jnp.arange(rows), jnp.arange(columns)
    token, head = first + row // group, kv_head * group + row % group
    own = (row < queries * group) & (token < stop)
    place = (token[:, None], head[:, None], column[None, :])
    inside = own[:, None] & (column < width)[None, :]
    query = triton.load(q.at[place], mask=inside, other=0)

    # The keys: all that one of the queries sees, and of these the split's share, in whole blocks.
    shift = kv_len[slot] - stop  # from a token's place in the batch to its position
    low = 0 if window is None else jnp.maximum(first + shift - window + 1, 0)
    high = jnp.where(first < stop, jnp.minimum(first + queries, stop) + shift, 0)
    start, splits = low // keys, pl.num_programs(1)
    turns = jnp.maximum(pl.cdiv(high, keys) - start, 0)

    def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        key = i * keys + jnp.arange(keys)
        wanted = (key >= low) & (key < high)  # other pages may be anyone's, and 0 x NaN is NaN
        page = triton.load(table.at[slot, key // page_size], mask=wanted, other=0)

        def read(data: Any, scales: Any) -> tuple[Array, Array]:
            at = (page, key % page_size)
            index = (*(one[:, None] for one in at), kv_head, column[None, :])
            mask = wanted[:, None] & (column < width)[None, :]
            codes = triton.load(data.at[index], mask=mask, other=0).astype(query.dtype)
            of_key = (
                1.0 if scales is None else triton.load(scales.at[*at, kv_head], mask=wanted, other=0)[None, :]
            )
            return codes, of_key

        codes, of_key = read(*k)
        scores = triton.dot(query, codes, trans_b=True) * (of_key * scale)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = (token + shift)[:, None] - key[None, :]
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(visible, scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(1))
        kept, weights = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
        codes, of_key = read(*v)
        mixed = mixed * kept[:, None] + triton.dot((weights * of_key).astype(query.dtype), codes)
        return higher, total * kept + weights.sum(1), mixed

    top, total = jnp.full(rows, _NOTHING, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sinks is not None:  # a key without a value, which the first split sees
        sink = triton.load(sinks.at[head]).astype(jnp.float32)
        top, total = jnp.where(split == 0, sink, top), jnp.where(split == 0, 1.0, total)
    shares = (start + turns * split // splits, start + turns * (split + 1) // splits)
    top, total, mixed = jax.lax.fori_loop(
        *shares, turn, (top, total, jnp.zeros((rows, columns), jnp.float32))
    )
    total = jnp.maximum(total, 1)  # less only without a key: the highest score alone gives 1
    triton.store(out.at[split, *place], (mixed / total[:, None]).astype(out.dtype), mask=inside)
    triton.store(logsum.at[split, token, head], top + jnp.log(total), mask=own)
