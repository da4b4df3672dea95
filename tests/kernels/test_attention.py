"""Attention against a float64 softmax written out, over dense batches and over pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import AttentionSpec, Pages, attention
from jaxopt_llm.models import Batch

SPECS = [
    AttentionSpec(scale=0.3),
    AttentionSpec(scale=0.25, window=7),
    AttentionSpec(scale=0.5, window=300, softcap=4.0),
]


def reference(q, k, v, spec, sinks=None, query_positions=None):
    """[T, N, H] of one sequence whose keys stand at 0..S-1."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    positions = np.arange(len(q)) if query_positions is None else query_positions
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, kv].T * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        distance = np.asarray(positions)[:, None] - np.arange(len(k))[None, :]
        hidden = (distance < 0) | (distance >= (spec.window or len(k) + 1))
        scores = np.where(hidden, -np.inf, scores)
        exponentials = np.exp(scores)
        total = exponentials.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(np.float64(sinks[head]))
        out[:, head] = exponentials / total @ v[:, kv]
    return out


def random_qkv(tokens, heads=6, kv_heads=3, width=10, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [
        jax.random.normal(k, (tokens, n, width))
        for k, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    ]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [1, 37, 600])
def test_dense(spec, length):
    q, k, v = random_qkv(2 * length)
    sinks = jnp.linspace(-1, 2, 6)
    batch = Batch.dense(jnp.zeros((2, length), jnp.int32))
    out, _ = jax.jit(lambda *args: attention(*args, None, spec, sinks))(q, k, v, batch)
    for row in range(2):
        part = slice(row * length, (row + 1) * length)
        np.testing.assert_allclose(out[part], reference(q[part], k[part], v[part], spec, sinks), atol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_pages_hold_what_a_dense_batch_sees(spec):
    """Ragged chunks of three sequences, interleaved, with padding, through pages in a scrambled order."""
    lengths, page_size = [45, 1, 20], 4
    order = np.random.default_rng(0).permutation(36)
    table = jnp.asarray(order.reshape(1, 3, 12), jnp.int32)
    sequences = [random_qkv(length, seed=i) for i, length in enumerate(lengths)]
    cache = Pages(*(jnp.full((36, page_size, 3, 10), 7.0) for _ in "kv"))
    outputs = [[] for _ in lengths]
    step = jax.jit(lambda q, k, v, batch, cache: attention(q, k, v, batch, cache, spec))
    for first in range(0, 45, 9):
        rows = [(slot, p) for slot, n in enumerate(lengths) for p in range(first, min(first + 9, n))]
        padding = 27 - len(rows)
        q, k, v = (
            np.stack(
                [np.asarray(sequences[slot][i])[p] for slot, p in rows]
                + [np.full((heads, 10), 9.0)] * padding
            )
            for i, heads in enumerate([6, 3, 3])
        )
        batch = ragged([s for s, _ in rows] + [3] * padding, [p for _, p in rows] + [5] * padding, table)
        out, cache = step(q, k, v, batch, cache)
        for (slot, _), row in zip(rows, out, strict=False):
            outputs[slot].append(row)
    for (q, k, v), out in zip(sequences, outputs, strict=True):
        np.testing.assert_allclose(np.stack(out), reference(q, k, v, spec), atol=2e-6)


def ragged(slots, positions, table):
    """A batch of any tokens of any slots. The reference reads slots and positions alone."""
    count = table.shape[1]
    ids = lambda values: jnp.asarray(values, jnp.int32)
    return Batch(
        tokens=ids([0] * len(slots)),
        positions=ids(positions),
        slots=ids(slots),
        kv_len=ids([0] * count),
        query_start=ids([0] * (count + 1)),
        num_slots=ids(count),
        page_table=table,
    )


def test_long_ragged_batches_are_cut():
    """More gathered keys than are held at once give what fewer give."""
    spec = AttentionSpec(scale=0.3)
    q, k, v = random_qkv(700, width=16)
    table = jnp.arange(44, dtype=jnp.int32).reshape(1, 1, 44)
    cache = Pages(*(jnp.zeros((44, 16, 3, 16)) for _ in "kv"))
    batch = ragged([0] * 700, list(range(700)), table)
    out, _ = jax.jit(lambda *args: attention(*args, spec))(q, k, v, batch, cache)
    np.testing.assert_allclose(out, reference(q, k, v, spec), atol=2e-6)


def test_gradients_through_blocks():
    """Blocks that are recomputed give the gradient of one that is not."""
    spec = AttentionSpec(scale=0.3, window=100)
    q, k, v = random_qkv(300)

    def loss(qkv, attend):
        return (attend(*qkv) ** 2).sum()

    blockwise = lambda q, k, v: attention(q, k, v, Batch.dense(jnp.zeros((1, 300), jnp.int32)), None, spec)[0]

    def plain(q, k, v):
        scores = jnp.einsum("tkgh,skh->kgts", q.reshape(300, 3, 2, 10), k) * spec.scale
        distance = jnp.arange(300)[:, None] - jnp.arange(300)[None, :]
        seen = (distance >= 0) & (distance < spec.window)
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,skh->tkgh", weights, v).reshape(300, 6, 10)

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    ours, theirs = slope((q, k, v), blockwise), slope((q, k, v), plain)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_ragged_batch_without_pages_is_refused():
    q, k, v = random_qkv(2)
    batch = dataclasses.replace(Batch.dense(jnp.zeros((1, 2), jnp.int32)), shape=None)
    with pytest.raises(ValueError, match="needs a cache"):
        attention(q, k, v, batch, None, SPECS[0])
