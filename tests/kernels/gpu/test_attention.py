"""The GPU kernel, interpreted, by the `jax.numpy` definition over the same pages."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import AttentionSpec, attention, gpu, init_pages
from jaxopt_llm.kernels.gpu import attend
from tests.kernels.test_attention import random_qkv
from tests.kernels.test_tpu_attention import PAGES_A_SLOT, batch

CHUNKS = ((0, 9), (3, 3), (17, 18), (20, 43))  # from where to where each slot goes; one has nothing to do
FAR = ((698, 700), (0, 2))
PLAIN, WINDOWED = AttentionSpec(scale=0.1), AttentionSpec(scale=0.08, window=7, softcap=4.0)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(gpu, "attend", functools.partial(attend, interpret=True))


def pages_and_table(page_size, heads, width, dtype, slots=4, pages_a_slot=PAGES_A_SLOT):
    """Something in every place, and a table in a scrambled order."""
    count = slots * pages_a_slot
    pages = init_pages(count, page_size, heads, width, jnp.dtype(dtype), kernel=True, platform="gpu")
    assert pages.kernel == "gpu"
    rng = np.random.default_rng(0)

    def some(store):
        codes = store.dtype == jnp.int8
        values = rng.integers(-127, 128, store.shape) if codes else rng.uniform(0.5, 2, store.shape)
        return jnp.asarray(values / 100 if store.ndim == 3 else values, store.dtype)

    table = rng.permutation(count).reshape(1, slots, pages_a_slot)
    return jax.tree.map(some, pages), jnp.asarray(table, jnp.int32)


def spoiled(pages, table, chunks, window):
    """NaN wherever no query of the batch may look: after a slot's end, before its windows, in pages of nobody."""
    page_size = pages.k.shape[1]
    seen = np.zeros(pages.k.shape[:2], bool)
    for (start, end), numbers in zip(chunks, np.asarray(table[0]), strict=False):
        position = np.arange(0 if window is None else max(0, start - window + 1), end if end > start else 0)
        seen[numbers[position // page_size], position % page_size] = True
    spoil = lambda a: jnp.where(seen.reshape(*seen.shape, *[1] * (a.ndim - 2)), a, jnp.nan)
    return jax.tree.map(lambda a: a if a.dtype == jnp.int8 else spoil(a), pages)


def both(chunks, tokens, pages, table, spec, *, heads, dtype="float32", sinks=None, values=1.0):
    """What the kernel gives and what the definition does, with the pages that they leave."""
    q, k, v = (
        x.astype(dtype)
        for x in random_qkv(tokens, heads=heads, kv_heads=pages.k.shape[2], width=pages.k.shape[3])
    )
    step, v = batch(chunks, table, tokens), (v * values).astype(dtype)
    run = jax.jit(lambda *args: attention(*args, spec, sinks))
    plain = dataclasses.replace(pages, kernel=None)
    (ours, after), (definition, expected) = (run(q, k, v, step, cache) for cache in (pages, plain))
    for mine, right in zip(*map(jax.tree.leaves, (after, expected)), strict=True):
        np.testing.assert_array_equal(mine.astype(jnp.float32), right.astype(jnp.float32))
    count = sum(end - start for start, end in chunks)
    assert not ours[count:].any()
    return ours[:count].astype(jnp.float32), definition[:count].astype(jnp.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "page_size", "spec", "dtype", "kept", "atol"),
    [
        (6, 2, 80, 4, PLAIN, "float32", "float32", 3e-6),
        (4, 4, 64, 3, WINDOWED, "float32", "float32", 3e-6),
        (8, 1, 96, 16, WINDOWED, "float32", "int8", 5e-6),
        (12, 3, 128, 8, PLAIN, "float32", "int8", 5e-6),
        (20, 1, 10, 16, PLAIN, "float32", "bfloat16", 3e-6),
        (3, 1, 256, 5, WINDOWED, "bfloat16", "bfloat16", 3e-2),
        (6, 2, 64, 16, PLAIN, "bfloat16", "int8", 3e-2),
        (4, 1, 80, 16, PLAIN, "float16", "float16", 4e-3),
        (16, 2, 96, 8, WINDOWED, "float16", "int8", 4e-3),
    ],
)
def test_chunks_beside_each_other(heads, kv_heads, width, page_size, spec, dtype, kept, atol):
    """Prompts, a token and a slot without any; groups, widths and pages of any size; nothing else is looked at."""
    pages, table = pages_and_table(page_size, kv_heads, width, kept)
    pages = spoiled(pages, table, CHUNKS, spec.window)
    sinks = jnp.linspace(-1, 2, heads) if spec is WINDOWED else None
    ours, definition = both(CHUNKS, 48, pages, table, spec, heads=heads, dtype=dtype, sinks=sinks)
    np.testing.assert_allclose(ours, definition, atol=atol)


@pytest.mark.parametrize("programs", [1, 256], ids=["whole", "split"])
@pytest.mark.parametrize("kept", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 600])
def test_keys_are_shared_among_programs(programs, kept, window, monkeypatch):
    """Few slots, one of them long: also programs that find nothing, beside a sink that counts once."""
    monkeypatch.setattr(sys.modules[attend.__module__], "_PROGRAMS", programs)
    pages, table = pages_and_table(16, 2, 64, kept, slots=4, pages_a_slot=64)
    spec = AttentionSpec(scale=0.1, window=window)
    ours, definition = both(FAR, 4, pages, table, spec, heads=6, sinks=jnp.linspace(-1, 8, 6))
    np.testing.assert_allclose(ours, definition, atol=3e-6)


def test_a_batch_of_nothing():
    pages, table = pages_and_table(4, 2, 64, "float32")
    ours, _ = both((), 4, pages, table, PLAIN, heads=4)
    assert len(ours) == 0


def test_heads_that_are_too_wide():
    with pytest.warns(UserWarning, match="heads of width 256 at most, not 320: attention runs in XLA"):
        pages = init_pages(3, 16, 2, 320, jnp.dtype("float32"), kernel=True, platform="gpu")
    assert pages.kernel is None


@pytest.mark.parametrize(("capability", "serves"), [("7.5", False), ("8.0", True), ("10.0", True)])
def test_old_cards(capability, serves, monkeypatch, recwarn):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    pages = init_pages(3, 16, 2, 64, jnp.dtype("float32"), kernel=True, platform="gpu")
    assert (pages.kernel == "gpu") is serves
    assert serves or "needs an NVIDIA card of compute capability 8.0" in str(recwarn.pop(UserWarning).message)


def test_small_values_in_float16():
    """Their scales lie in float32, and are not lost where weights meet codes in halves."""
    pages, table = pages_and_table(8, 2, 64, "int8")
    small = dataclasses.replace(pages, v_scale=pages.v_scale / 1000)
    chunks = ((20, 21), (33, 34))
    ours, definition = both(chunks, 2, small, table, PLAIN, heads=4, dtype="float16", values=1e-3)
    np.testing.assert_allclose(ours, definition, atol=2e-3 * float(jnp.abs(definition).max()))
