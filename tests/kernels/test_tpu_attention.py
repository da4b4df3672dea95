"""The TPU kernel's side of attention: what we write, pad and cut for it, by the reference that JAX ships beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as theirs

from jaxopt_llm.kernels import AttentionSpec, CombinedPages, Pages, attention, init_pages
from jaxopt_llm.models import Batch
from tests.kernels.test_attention import random_qkv, reference

PAGE, PAGES_A_SLOT = 4, 16
LENGTHS = (27, 1, 14)  # of three sequences, fed at most 9 tokens at a time
PLAIN, WINDOWED = AttentionSpec(scale=0.3), AttentionSpec(scale=0.25, window=7, softcap=4.0)


@pytest.fixture
def by_reference(monkeypatch):
    """JAX's reference in the place of its kernel, and the tables that it is given."""
    tables = []

    def run(q, kv, *, page_indices, num_kv_pages_per_block, num_queries_per_block, **settings):
        assert num_kv_pages_per_block <= page_indices.shape[1]
        tables.append(page_indices.shape)
        out = theirs.ref_ragged_paged_attention(q, kv, page_indices=page_indices, **settings)
        return jnp.concatenate(
            [out, jnp.full((len(q) - len(out), *q.shape[1:]), jnp.nan)]
        )  # as memory may be

    monkeypatch.setattr(theirs, "ragged_paged_attention", run)
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, where: x)
    return tables


def batch(lengths, table, tokens):
    """A step over slots whose (start, end) are given, padded to so many tokens."""
    pieces = [(slot, p) for slot, (start, end) in enumerate(lengths) for p in range(start, end)]
    padding = tokens - len(pieces)
    ids = lambda values: jnp.asarray(values, jnp.int32)
    return Batch(
        tokens=ids([0] * tokens),
        positions=ids([p for _, p in pieces] + [3] * padding),
        slots=ids([slot for slot, _ in pieces] + [table.shape[1]] * padding),
        kv_len=ids([end for _, end in lengths] + [0] * (table.shape[1] - len(lengths))),
        query_start=ids(np.cumsum([0, *(end - start for start, end in lengths)] + [0] * (4 - len(lengths)))),
        num_slots=ids(len(lengths)),
        page_table=table,
    )


@pytest.mark.parametrize(
    ("spec", "heads", "kv_heads", "width"),
    [(PLAIN, 6, 3, 10), (WINDOWED, 14, 2, 64), (WINDOWED, 4, 2, 256)],
)
@pytest.mark.filterwarnings("ignore:the TPU's attention kernel takes no")
def test_chunks_of_sequences(by_reference, spec, heads, kv_heads, width):
    """Widths, heads and pages that the kernel refuses, through pages in a scrambled order."""
    order = np.random.default_rng(0).permutation(64)
    table = jnp.asarray(order.reshape(1, 4, PAGES_A_SLOT), jnp.int32)
    shape = {"heads": heads, "kv_heads": kv_heads, "width": width}
    sequences = [random_qkv(length, seed=i, **shape) for i, length in enumerate(LENGTHS)]
    cache = init_pages(64, PAGE, kv_heads, width, jnp.float32, kernel=True, platform="tpu")
    assert isinstance(cache, CombinedPages)
    outputs = [[] for _ in LENGTHS]
    for start in range(0, max(LENGTHS), 9):
        alive = [slot for slot, length in enumerate(LENGTHS) if length > start]
        spans = [(start, min(LENGTHS[slot], start + 9)) for slot in alive]
        q, k, v = (
            jnp.concatenate(
                [sequences[slot][i][a:b] for slot, (a, b) in zip(alive, spans, strict=True)]
                + [jnp.full((32, n, width), jnp.nan)]
            )[:32]
            for i, n in enumerate((heads, kv_heads, kv_heads))
        )
        step = batch(spans, table[:, jnp.asarray(alive + [3] * (4 - len(alive)))], 32)
        out, cache = attention(q, k, v, step, cache, spec)
        for (a, b), at, slot in zip(spans, step.query_start, alive, strict=False):
            outputs[slot].append(out[at : at + b - a])
        assert not out[sum(b - a for a, b in spans) :].any()
    for (q, k, v), out in zip(sequences, outputs, strict=True):
        np.testing.assert_allclose(np.concatenate(out), reference(q, k, v, spec), atol=5e-6)
    seen = PAGES_A_SLOT if spec.window is None else min(PAGES_A_SLOT, -(-(spec.window + 30) // PAGE) + 1)
    assert set(by_reference) == {(4, seen)}


def test_a_batch_of_nothing_still_has_one_sequence(by_reference):
    """A shard without work, or a program that is only compiled: the kernel must not be called with no slot."""
    cache = init_pages(4, PAGE, 4, 128, jnp.float32, kernel=True, platform="tpu")
    q, k, v = random_qkv(2, heads=4, kv_heads=4, width=128)
    empty = batch([], jnp.zeros((1, 4, PAGES_A_SLOT), jnp.int32), 2)
    out, after = attention(q, k, v, empty, cache, AttentionSpec(scale=1.0))
    assert not out.any()
    jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "held"),
    [
        (8, 128, jnp.bfloat16, [(16, 128)]),
        (1, 128, jnp.bfloat16, [(2, 128)]),
        (3, 64, jnp.bfloat16, [(8, 128)]),
        (4, 256, jnp.bfloat16, [(2, 256)] * 4),
        (3, 160, jnp.bfloat16, [(2, 256)] * 3),
        (12, 128, jnp.bfloat16, [(32, 128)]),
        (5, 96, jnp.float32, [(16, 128)]),
        (12, 128, jnp.float32, [(24, 128)]),
    ],
)
@pytest.mark.filterwarnings("ignore:the TPU's attention kernel takes no")
def test_shapes_that_the_kernel_takes(heads, width, dtype, held):
    pages = init_pages(3, 16, heads, width, jnp.dtype(dtype), kernel=True, platform="tpu")
    assert [kv.shape for kv in pages.kv] == [(3, 16, *shape) for shape in held]


def test_padding_is_told():
    with pytest.warns(
        UserWarning, match="no 3 key/value heads of width 64: pages hold 4 of width 128, 2.67 times"
    ):
        init_pages(3, 16, 3, 64, jnp.bfloat16, kernel=True, platform="tpu")


def test_sinks_are_left_to_xla():
    with pytest.warns(UserWarning, match="knows no sinks: attention runs in XLA"):
        pages = init_pages(3, 16, 8, 128, jnp.bfloat16, kernel=True, sinks=True, platform="tpu")
    assert isinstance(pages, Pages) and not pages.kernel


def test_pages_without_sinks_refuse_them():
    pages = init_pages(4, PAGE, 4, 128, jnp.float32, kernel=True, platform="tpu")
    q, k, v = random_qkv(2, heads=4, kv_heads=4, width=128)
    step = batch([(0, 2)], jnp.zeros((1, 4, PAGES_A_SLOT), jnp.int32), 2)
    with pytest.raises(ValueError, match=r"make them by init_pages\(sinks=True\)"):
        attention(q, k, v, step, pages, AttentionSpec(scale=1.0), jnp.zeros(4))


def test_codes_are_refused():
    with pytest.raises(ValueError, match=r"one scale a tensor on a TPU, .* take cache_dtype='bfloat16'"):
        init_pages(3, 16, 8, 128, jnp.int8, kernel=True, platform="tpu")


def test_a_uniform_batch_attends_to_itself():
    """And is kept for the ragged batches that follow."""
    q, k, v = random_qkv(20, heads=4, kv_heads=4, width=128)
    table = jnp.arange(32, dtype=jnp.int32).reshape(1, 2, PAGES_A_SLOT)
    dense = Batch.dense(jnp.zeros((2, 10), jnp.int32), page_table=table)
    spec = AttentionSpec(scale=0.1)
    pages = init_pages(32, PAGE, 4, 128, jnp.float32, kernel=True, platform="tpu")
    out, written = jax.jit(lambda *args: attention(*args, spec))(q, k, v, dense, pages)
    np.testing.assert_allclose(out[10:], reference(q[10:], k[10:], v[10:], spec), atol=2e-6)
    second = written.kv[0][16:18].reshape(8, 8, 128)  # the first tokens of the second row
    np.testing.assert_array_equal(second[:, ::2], k[10:18])
    np.testing.assert_array_equal(second[:, 1::2], v[10:18])
