"""Attention over pages where they lie, in Pallas for Triton.

A program takes a block of one slot's queries, with all query heads of one key/value head, and walks over the keys that
they see with a running softmax (arXiv:2205.14135). Where slots are few, several programs share the keys of a block, and
what they give is merged (Flash-Decoding: pytorch.org/blog/flash-decoding).
"""

import functools
from typing import Any, NamedTuple

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
_SMALLEST = 1.2e-38  # that float32 has without loss
_NOTHING = -1e30  # stands for the logarithm of 0; finite, so that differences are numbers


class _Sizes(NamedTuple):
    """How the work is cut.

    Attributes:
      queries: of a block, at most.
      rows: of a block, one a query and head; the last may be idle.
      columns: for the width of a head.
      keys: of a block, which are read at once.
      grid: key/value heads, programs that share a block's keys, blocks. Heads vary fastest: what they read together
        lies together.
    """

    queries: int
    rows: int
    columns: int
    keys: int
    grid: tuple[int, int, int]


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
    sizes = _sizes(q, pages, table, window)
    splits, count = sizes.grid[1], table.shape[0]
    lengths = jnp.where(jnp.arange(count) < num_slots, query_start[1:] - query_start[:-1], 0)
    block_end = jnp.cumsum(pl.cdiv(lengths, sizes.queries))  # of each slot
    ids = (a.astype(jnp.int32) for a in (table, kv_len, query_start, block_end))
    out, logsum = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, scale=scale, window=window, softcap=softcap),
        grid=sizes.grid,
        out_shape=(
            jax.ShapeDtypeStruct((splits, *q.shape), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, *q.shape[:2]), jnp.float32),
        ),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(*ids, q, (pages.k, pages.k_scale), (pages.v, pages.v_scale), sinks)
    merged = out[0] if splits == 1 else (out * jax.nn.softmax(logsum, axis=0)[..., None]).sum(0)
    return jnp.where((slots < count)[:, None, None], merged.astype(q.dtype), 0)


def _sizes(q: Array, pages: Pages, table: Array, window: int | None) -> _Sizes:
    (tokens, heads, width), (_, page_size, kv_heads, _), (count, most) = q.shape, pages.k.shape, table.shape
    group = heads // kv_heads
    rows = pl.next_power_of_2(max(_LEAST, group, min(_ROWS, group * pl.cdiv(tokens, count))))
    queries = rows // group
    columns = pl.next_power_of_2(max(_LEAST, width))
    blocks = min(tokens, tokens // queries + count)  # no more can be needed: one of each slot is not full
    seen = most * page_size if window is None else min(most * page_size, window + queries)
    splits = max(1, min(pl.cdiv(_PROGRAMS, blocks * kv_heads), seen // _SHARE))
    keys = max(_LEAST, _TILE // (columns * q.dtype.itemsize))
    return _Sizes(queries, rows, columns, keys, (kv_heads, splits, blocks))


class _Block(NamedTuple):
    """A program's queries, and the keys that one of them sees.

    Attributes:
      kv_head: whose keys and values they meet.
      slot: whose tokens they are.
      token: of each row, its place in the batch.
      head: of each row, among the query heads.
      own: whether a row has a query.
      shift: from a token's place in the batch to its position.
      low, high: positions of the keys.
    """

    kv_head: Array
    slot: Array
    token: Array
    head: Array
    own: Array
    shift: Array
    low: Array | int
    high: Array


class _Keys(NamedTuple):
    """Some keys that are read at once.

    Attributes:
      position: of each in its sequence.
      wanted: whether a query may see it: other places may be anyone's, and 0 x NaN is NaN.
      page, at: where it lies.
    """

    position: Array
    wanted: Array
    page: Array
    at: Array


def _kernel(
    table: Any, kv_len: Any, query_start: Any, block_end: Any, q: Any, k: Any, v: Any, sinks: Any,
    out: Any, logsum: Any,
    *, sizes: _Sizes, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """One program. References to whole arrays, as `attend` passes them: `k` and `v` each with scales or None.

    Writes the softmax over its share of the keys, and the logarithm of the sum that it was divided by.
    """
    split, column = pl.program_id(1), jnp.arange(sizes.columns)
    block = _block(kv_len, query_start, block_end, q.shape[1] // sizes.grid[0], sizes, window)
    place = (block.token[:, None], block.head[:, None], column[None, :])
    inside = block.own[:, None] & (column < q.shape[2])[None, :]
    query = triton.load(q.at[place], mask=inside, other=0)

    def turn(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        keys = _keys(table, block, i * sizes.keys + jnp.arange(sizes.keys), page_size=k[0].shape[1])
        codes, of_key = _read(k, keys, block.kv_head, column, query.dtype)
        scores = triton.dot(query, codes, trans_b=True) * (scale if of_key is None else of_key * scale)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = (block.token + block.shift)[:, None] - keys.position[None, :]
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(visible, scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(1))
        kept, weights = jnp.exp(top - higher), jnp.exp(scores - higher[:, None])
        more = _mix(weights, *_read(v, keys, block.kv_head, column, query.dtype))
        return higher, total * kept + weights.sum(1), mixed * kept[:, None] + more

    top, total = jnp.full(sizes.rows, _NOTHING, jnp.float32), jnp.zeros(sizes.rows, jnp.float32)
    if sinks is not None:  # a key without a value, which the first split sees
        sink = triton.load(sinks.at[block.head]).astype(jnp.float32)
        top, total = jnp.where(split == 0, sink, top), jnp.where(split == 0, 1.0, total)
    nothing = jnp.zeros((sizes.rows, sizes.columns), jnp.float32)
    top, total, mixed = jax.lax.fori_loop(*_share(block, split, sizes), turn, (top, total, nothing))
    total = jnp.maximum(total, 1)  # less only without a key: the highest score alone gives 1
    triton.store(out.at[split, *place], (mixed / total[:, None]).astype(out.dtype), mask=inside)
    triton.store(logsum.at[split, block.token, block.head], top + jnp.log(total), mask=block.own)


def _block(
    kv_len: Any, query_start: Any, block_end: Any, group: int, sizes: _Sizes, window: int | None
) -> _Block:
    kv_head, queries, row = pl.program_id(0), sizes.queries, jnp.arange(sizes.rows)
    slot, first, stop = _own_tokens(pl.program_id(2), block_end, query_start, queries)
    token, head = first + row // group, kv_head * group + row % group
    own = (row < queries * group) & (token < stop)
    shift = kv_len[slot] - stop
    low = 0 if window is None else jnp.maximum(first + shift - window + 1, 0)
    high = jnp.where(first < stop, jnp.minimum(first + queries, stop) + shift, 0)
    return _Block(kv_head, slot, token, head, own, shift, low, high)


def _share(block: _Block, split: Array, sizes: _Sizes) -> tuple[Array, Array]:
    """From which to before which of all runs of `sizes.keys` keys the program goes."""
    splits, start = sizes.grid[1], block.low // sizes.keys
    turns = jnp.maximum(pl.cdiv(block.high, sizes.keys) - start, 0)
    return start + turns * split // splits, start + turns * (split + 1) // splits


def _keys(table: Any, block: _Block, position: Array, *, page_size: int) -> _Keys:
    wanted = (position >= block.low) & (position < block.high)
    number, at = jax.lax.div(position, page_size), jax.lax.rem(position, page_size)
    page = triton.load(table.at[block.slot, number], mask=wanted, other=0)
    return _Keys(position, wanted, page, at)


def _read(store: Any, keys: _Keys, kv_head: Array, column: Array, dtype: Any) -> tuple[Array, Array | None]:
    """Keys or values, and of codes the scale of each."""
    data, scales = store
    index = (keys.page[:, None], keys.at[:, None], kv_head, column[None, :])
    whole = keys.wanted[:, None] & (column < data.shape[-1])[None, :]
    codes = triton.load(data.at[index], mask=whole, other=0).astype(dtype)
    if scales is None:
        return codes, None
    return codes, triton.load(scales.at[keys.page, keys.at, kv_head], mask=keys.wanted, other=0)[None, :]


def _mix(weights: Array, codes: Array, of_key: Array | None) -> Array:
    """The weighted sum of values."""
    if of_key is not None:
        weights = weights * of_key
    if of_key is None or codes.dtype != jnp.float16:
        return triton.dot(weights.astype(codes.dtype), codes)
    # float16 has no numbers for weights times small scales: a row's largest is taken out.
    largest = jnp.maximum(weights.max(1), _SMALLEST)[:, None]
    return triton.dot((weights / largest).astype(codes.dtype), codes) * largest


def _own_tokens(block: Array, block_end: Any, query_start: Any, queries: int) -> tuple[Array, Array, Array]:
    """Whose block it is, its first token and where the slot's tokens end; for a block of nobody no token is before."""
    count = block_end.shape[0]
    each = jnp.arange(pl.next_power_of_2(count))
    ends = triton.load(block_end.at[each], mask=each < count, other=2**31 - 1)
    slot = (ends <= block).astype(jnp.int32).sum()
    first = query_start[slot] + (block - jnp.where(ends <= block, ends, 0).max()) * queries
    stop = query_start[jnp.minimum(slot + 1, count)]
    return jnp.minimum(slot, count - 1), first, stop
