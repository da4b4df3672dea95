"""Attention over a ragged batch: the `jax.numpy` definition.

Letters: T tokens, N query heads, K key/value heads, H head width, S key length, R slots, P pages a slot,
G kinds of attention.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxopt_llm.kernels import pages, tpu
from jaxopt_llm.kernels.cpu.attend import attend
from jaxopt_llm.kernels.pages import CombinedPages, LayerCache, Pages

_BLOCK = 256  # queries that attend at once over a dense batch
_GATHERED = 2**22  # elements of keys gathered from pages at once
_MASKED = -1e30  # finite, so that a padding row with nothing to see stays free of NaN


@runtime_checkable
class Rows(Protocol):
    """Which token is which: the part of a batch that attention reads."""

    @property
    def positions(self) -> Int[Array, "T"]: ...

    @property
    def slots(self) -> Int[Array, "T"]:
        """The slot of each token; out of range for padding."""

    @property
    def kv_len(self) -> Int[Array, "R"]:
        """Tokens of each slot once this batch is in."""

    @property
    def query_start(self) -> Int[Array, "R1"]:
        """Where each slot's tokens start; slots follow one another."""

    @property
    def num_slots(self) -> Int[Array, ""]:
        """Slots in use, the first ones."""

    @property
    def page_table(self) -> Int[Array, "G R P"] | None: ...

    @property
    def shape(self) -> tuple[int, int] | None:
        """(sequences, tokens each) of a uniform batch whose rows all start at position 0, else None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What differs between attention layers.

    Attributes:
      scale: factor on the scores.
      window: a query sees this many latest positions, itself included; None for all.
      softcap: scores become `softcap * tanh(scores / softcap)` (arXiv:2408.00118, section 2).
      kind: which page table the layer uses.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    kind: int = 0


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    rows: Rows,
    cache: LayerCache | None,
    spec: AttentionSpec,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], LayerCache | None]:
    """Causal grouped-query attention (arXiv:2305.13245); writes the new keys and values first.

    A uniform batch attends to itself alone, blockwise, with gradients. A ragged one reads everything
    its slots hold in the pages. Over pages that `init_pages(kernel=True)` made for a kernel, that kernel
    runs, without gradients; the TPU's and the GPU's only for ragged batches.

    Args:
      q, k, v: projections, with positions already rotated in.
      rows: slot and position of every token.
      cache: pages, or None for a uniform batch that keeps nothing.
      spec: scale, window, soft-cap.
      sinks: a score for each head that takes part in the softmax without a value (gpt-oss).

    Raises:
      ValueError: for a ragged batch without pages.
    """
    if isinstance(cache, Pages) and cache.kernel == "cpu":
        return attend(
            q, k, v, cache,
            positions=rows.positions, slots=rows.slots, table=_table(rows, spec.kind),
            sinks=sinks, scale=spec.scale, window=spec.window, softcap=spec.softcap,
        )  # fmt: skip
    if cache is not None:
        cache = _write(cache, k, v, rows, spec.kind)
        dtype = jax.tree.leaves(cache)[0].dtype
        k, v = pages.kept(k, dtype), pages.kept(v, dtype)
    if rows.shape is not None:
        return _dense(q, k, v, rows.shape, spec, sinks), cache
    if cache is None:
        raise ValueError("a ragged batch needs a cache: pass one, or a uniform batch (Batch.dense)")
    if isinstance(cache, CombinedPages):
        if sinks is not None:
            raise ValueError(
                "these pages are for a kernel without sinks; make them by init_pages(sinks=True)"
            )
        return _reading(tpu.attend, rows, spec)(q, cache, heads=k.shape[1]), cache
    if cache.kernel == "gpu":
        from jaxopt_llm.kernels import gpu

        return _reading(gpu.attend, rows, spec)(q, cache, sinks=sinks), cache
    return _paged(q, cache, rows, spec, sinks), cache


def _reading(attend: Callable[..., Array], rows: Rows, spec: AttentionSpec) -> Callable[..., Array]:
    """A kernel that reads pages which hold the batch already, told of the batch and the layer."""
    return functools.partial(
        attend,
        slots=rows.slots, kv_len=rows.kv_len, query_start=rows.query_start, num_slots=rows.num_slots,
        table=_table(rows, spec.kind), scale=spec.scale, window=spec.window, softcap=spec.softcap,
    )  # fmt: skip


def _table(rows: Rows, kind: int) -> Int[Array, "R P"]:
    if rows.page_table is None:
        raise ValueError("a cache needs a page table: build the batch with one")
    return rows.page_table[kind]


def _write(cache: LayerCache, k: Array, v: Array, rows: Rows, kind: int) -> LayerCache:
    count, page_size = jax.tree.leaves(cache)[0].shape[:2]
    page = _table(rows, kind).at[rows.slots, rows.positions // page_size].get(mode="fill", fill_value=count)
    return pages.write(cache, k, v, page, rows.positions % page_size)


def _paged(q: Array, cache: Pages, rows: Rows, spec: AttentionSpec, sinks: Array | None) -> Array:
    table = _table(rows, spec.kind)

    def one(query: Array, position: Array, slot: Array) -> Array:
        keys, values = pages.read(cache, table[slot], query.dtype)
        visible = _visible(position[None], jnp.arange(keys.shape[0]), spec.window)
        values = jnp.where(visible[0, :, None, None], values, 0)  # others' may be NaN, and 0 x NaN is NaN
        return _attend(query[None, None], keys[None], values[None], visible, spec, sinks)[0, 0]

    gathered = table.shape[1] * cache.k[0].size
    step = max(1, _GATHERED // gathered)
    inputs = (q, rows.positions, rows.slots)
    if q.shape[0] <= step:
        return jax.vmap(one)(*inputs)
    return jax.lax.map(lambda args: one(*args), inputs, batch_size=step)


def _dense(
    q: Array, k: Array, v: Array, shape: tuple[int, int], spec: AttentionSpec, sinks: Array | None
) -> Array:
    batch, length = shape
    q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
    if length <= _BLOCK:
        positions = jnp.arange(length)
        out = _attend(q, k, v, _visible(positions, positions, spec.window), spec, sinks)
    else:
        out = _blockwise(q, k, v, spec, sinks)
    return out.reshape(batch * length, *out.shape[2:])


def _blockwise(q: Array, k: Array, v: Array, spec: AttentionSpec, sinks: Array | None) -> Array:
    """[B, T, N, H]: blocks of queries one after another, recomputed in the backward pass."""
    batch, length = q.shape[:2]
    blocks = -(-length // _BLOCK)
    seen = length if spec.window is None else min(length, spec.window - 1 + _BLOCK)
    queries = jnp.pad(q, ((0, 0), (0, blocks * _BLOCK - length), (0, 0), (0, 0)))
    queries = queries.reshape(batch, blocks, _BLOCK, *q.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def block(args: tuple[Array, Array]) -> Array:
        index, query = args
        first = jnp.clip((index + 1) * _BLOCK - seen, 0, length - seen)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, seen, axis=1) for x in (k, v))
        visible = _visible(index * _BLOCK + jnp.arange(_BLOCK), first + jnp.arange(seen), spec.window)
        return _attend(query, keys, values, visible, spec, sinks)

    out = jax.lax.map(block, (jnp.arange(blocks), queries))
    return out.swapaxes(0, 1).reshape(batch, blocks * _BLOCK, *q.shape[2:])[:, :length]


def _visible(query: Int[Array, "T"], key: Int[Array, "S"], window: int | None) -> Bool[Array, "T S"]:
    distance = query[:, None] - key[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "T S"],
    spec: AttentionSpec,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "B T N H"]:
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    grouped = q.reshape(*q.shape[:2], *groups, q.shape[-1])
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = dot("btkgh,bskh->bkgts", grouped, k.astype(q.dtype)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    scores = jnp.where(visible[None, None, None], scores, _MASKED)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, *groups, 1, 1)
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    out = dot("bkgts,bskh->btkgh", (weights / total).astype(q.dtype), v.astype(q.dtype))
    return out.reshape(q.shape).astype(q.dtype)
