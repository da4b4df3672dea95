"""The CPU attention kernel against float64 NumPy, on every instruction set that this machine can run."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_llm.kernels import AttentionSpec, attention, init_pages
from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.models import Batch, ModelConfig, Transformer, init_cache
from jaxopt_llm.models.config import Rope

P = jax.sharding.PartitionSpec

pytestmark = pytest.mark.skipif(library.load() is None, reason="the library was not built: no C++ compiler")
ISAS = library.supported() if library.load() else []
DTYPES = ("float32", "bfloat16", "int8")
PLAIN = AttentionSpec(scale=0.2)
SPECS = {
    "plain": PLAIN,
    "window": AttentionSpec(scale=0.2, window=7),
    "wide window": AttentionSpec(scale=0.2, window=100),
    "softcap": AttentionSpec(scale=0.4, softcap=3.0),
}
LENGTHS = (150, 1, 70)  # of the sequences


def every_isa():
    """Runs the body of a loop on each; programs compile once for all."""
    for isa in ISAS:
        library.configure(isa=isa)
        yield isa
    library.configure(isa=ISAS[0])


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int = 6
    kv_heads: int = 2
    width: int = 32
    page_size: int = 16
    dtype: str = "float32"

    def sequences(self):
        """q, k and v of each sequence."""
        rng = np.random.default_rng(0)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [
            [rng.normal(size=(n, heads, self.width)).astype(np.float32) for heads in counts] for n in LENGTHS
        ]

    def pages(self):
        """Pages that hold NaN, and a table that takes them in no order."""
        each = -(-max(LENGTHS) // self.page_size)
        order = np.random.default_rng(1).permutation(len(LENGTHS) * each)
        table = jnp.asarray(order.reshape(1, len(LENGTHS), each), jnp.int32)
        pages = init_pages(
            len(order), self.page_size, self.kv_heads, self.width, jnp.dtype(self.dtype), kernel=True
        )
        assert pages.kernel
        fill = lambda a: jnp.full_like(a, 99 if a.dtype == jnp.int8 else jnp.nan)
        return jax.tree.map(fill, pages), table


def batches(chunk, *, padding=2):
    """(slot, position) of every token, `chunk` of each sequence a batch, those of a slot in order; then padding."""
    for first in range(0, max(LENGTHS), chunk):
        rows = [(s, p) for s, n in enumerate(LENGTHS) for p in range(first, min(first + chunk, n))]
        yield rows + [(len(LENGTHS), 3)] * padding


def mixed():
    """One batch of a long chunk, then decoding beside chunks of several lengths."""
    yield [(0, p) for p in range(140)]
    yield [(2, p) for p in range(60)] + [(0, 140), (1, 0)]
    for step in range(1, 10):
        yield [(0, 140 + step), (2, 59 + step)]
    yield [(2, 69)]


@functools.partial(jax.jit, static_argnames="spec")
def attend(q, k, v, batch, pages, sinks=None, *, spec):
    return attention(q, k, v, batch, pages, spec, sinks)


def run(shape, spec, steps, sinks=None):
    """[T, N, H] of all sequences, one after another, as the batches of `steps` give it."""
    padding = [np.full((1, n, shape.width), 7, np.float32) for n in (shape.heads, *[shape.kv_heads] * 2)]
    rows = [np.concatenate([*xs, end]) for *xs, end in zip(*shape.sequences(), padding, strict=True)]
    first = np.cumsum([0, *LENGTHS])
    outputs = np.zeros_like(rows[0])
    pages, table = shape.pages()
    for step in steps:
        width = next(n for n in (4, 64, 256, 512) if n >= len(step))  # few programs
        step = np.asarray(step + [(len(LENGTHS), 0)] * (width - len(step)))
        token = np.where(step[:, 0] < len(LENGTHS), first[step[:, 0]] + step[:, 1], first[-1])
        batch = ragged(step, table)
        out, pages = attend(*(x[token] for x in rows), batch, pages, sinks, spec=spec)
        outputs[token] = out
    assert not outputs[-1].any()
    return outputs[:-1]


def ragged(rows, table):
    slots, positions = jnp.asarray(rows, jnp.int32).T
    count = table.shape[1]
    return Batch(
        tokens=jnp.zeros_like(slots),
        positions=positions,
        slots=slots,
        kv_len=jnp.zeros(count, jnp.int32),
        query_start=jnp.zeros(count + 1, jnp.int32),
        num_slots=jnp.asarray(count, jnp.int32),
        page_table=table,
    )


def kept(x, dtype):
    """What pages hold of `x`, in float64."""
    if dtype != "int8":
        return np.asarray(jnp.asarray(x, dtype), np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.clip(np.round(x / scale), -127, 127).astype(np.float64) * scale


def reference(shape, spec, sinks=None):
    results = []
    for q, k, v in shape.sequences():
        group = shape.heads // shape.kv_heads
        keys, values = (np.repeat(kept(x, shape.dtype), group, axis=1) for x in (k, v))
        scores = np.einsum("tnh,snh->nts", q.astype(np.float64), keys) * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        distance = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
        seen = (distance >= 0) & (distance < (spec.window or len(q)))
        weights = np.where(seen, np.exp(scores), 0)
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(np.asarray(sinks, np.float64))[:, None, None]
        results.append(np.einsum("nts,snh->tnh", weights / total, values))
    return np.concatenate(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_masks(spec, dtype):
    check(Shape(dtype=dtype), SPECS[spec], jnp.linspace(-1, 2, 6))


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 1), (5, 1), (7, 1), (16, 2)])
def test_heads_that_share_keys(heads):
    for dtype in DTYPES[:1] if heads[1] > 1 else DTYPES[1:]:
        check(Shape(*heads, dtype=dtype), PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_widths(width, dtype):
    check(Shape(width=width, dtype=dtype), AttentionSpec(scale=width**-0.5))


def check(shape, spec, sinks=None):
    """Against float64, on every instruction set."""
    expected = reference(shape, spec, sinks)
    for _ in every_isa():
        np.testing.assert_allclose(run(shape, spec, mixed(), sinks), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["plain", "wide window"])
def test_bits_depend_on_nothing_else(spec, dtype):
    """Neither on chunks, neighbours and page sizes nor on threads."""
    spec, shape = SPECS[spec], Shape(9, 3, 64, dtype=dtype)
    for _ in every_isa():
        whole = run(shape, spec, batches(150))
        same = lambda result, whole=whole: np.testing.assert_array_equal(result, whole)
        for chunk in (10, 33, 64):
            same(run(shape, spec, batches(chunk)))
        same(run(dataclasses.replace(shape, page_size=48), spec, mixed()))
        for threads in (1, 3, 8):
            library.configure(threads=threads)
            same(run(shape, spec, mixed()))
        library.configure(threads=2)
        alone = [[(0, p) for p in range(149)], [(0, 149)]]
        np.testing.assert_array_equal(run(shape, spec, alone)[:150], whole[:150])


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_contexts_keep_their_bits(dtype):
    """A decoding slot's long context is shared out among threads."""
    length = 1000
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(length, n, 64)).astype(np.float32) for n in (9, 3, 3))
    table = jnp.arange(63, dtype=jnp.int32).reshape(1, 1, 63)
    rows = [(0, p) for p in range(length)]
    for _ in every_isa():
        pages = init_pages(63, 16, 3, 64, jnp.dtype(dtype), kernel=True)
        whole, pages = attend(q, k, v, ragged(rows, table), pages, spec=PLAIN)
        for threads in (1, 2, 5):
            library.configure(threads=threads)
            last, _ = attend(q[-1:], k[-1:], v[-1:], ragged(rows[-1:], table), pages, spec=PLAIN)
            np.testing.assert_array_equal(last[0], whole[-1])
        library.configure(threads=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [PLAIN, dataclasses.replace(PLAIN, window=9)])
def test_nan_stays_with_those_that_see_it(dtype, spec):
    """Not with the tokens before it in the same batch, nor with those whose window it has left."""
    length, bad = 300, 150
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(length, n, 32)).astype(np.float32) for n in (4, 2, 2))
    batch = ragged([(0, p) for p in range(length)], jnp.arange(19, dtype=jnp.int32).reshape(1, 1, 19))
    for _ in every_isa():
        clean, dirty = (
            attend(q, k, at, batch, init_pages(19, 16, 2, 32, jnp.dtype(dtype), kernel=True), spec=spec)[0]
            for at in (v, np.where(np.arange(length)[:, None, None] == bad, np.nan, v).astype(np.float32))
        )
        end = length if spec.window is None else bad + spec.window
        assert np.isnan(dirty[bad:end]).all()
        np.testing.assert_array_equal(dirty[:bad], clean[:bad])
        np.testing.assert_array_equal(dirty[end:], clean[end:])


def test_the_definition_keeps_the_same_codes():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(40, n, 32)), jnp.float32) for n in (4, 2, 2))
    batch = ragged([(0, p) for p in range(40)], jnp.arange(3, dtype=jnp.int32).reshape(1, 1, 3))
    results = []
    for kernel in (True, False):
        pages = init_pages(3, 16, 2, 32, jnp.int8, kernel=kernel)
        results.append(attend(q, k, v, batch, pages, spec=PLAIN))
    (ours, kernel), (theirs, plain) = results
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    np.testing.assert_array_equal(kernel.v.transpose(0, 2, 1, 3), plain.v)
    np.testing.assert_array_equal(kernel.k.transpose(0, 2, 4, 1, 3).reshape(plain.k.shape), plain.k)
    # XLA multiplies with 1/127 where the kernel divides
    np.testing.assert_allclose(kernel.k_scale.transpose(0, 2, 1), plain.k_scale, rtol=2e-7)
    np.testing.assert_allclose(kernel.v_scale.transpose(0, 2, 1), plain.v_scale, rtol=2e-7)


def test_uniform_batches_and_half_precision():
    """Prompts as `Batch.dense` lays them out, padded; bfloat16 in and out."""
    q, k, v = (np.stack([x[:70] for x in xs]) for xs in zip(*(s for s in long_sequences()), strict=True))
    table = jnp.arange(10, dtype=jnp.int32).reshape(1, 2, 5)
    batch = Batch.dense(jnp.zeros((2, 70), jnp.int32), jnp.asarray([70, 33]), table)
    outputs = []
    for dtype, kernel in ((jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, True)):
        flat = [jnp.asarray(x.reshape(140, *x.shape[2:]), dtype) for x in (q, k, v)]
        pages = init_pages(10, 16, 2, 32, dtype, kernel=kernel)
        out, _ = attend(*flat, batch, pages, spec=PLAIN)
        assert out.dtype == dtype
        outputs.append(np.asarray(out.astype(jnp.float32)).reshape(2, 70, 6, 32))
    for row, length in enumerate((70, 33)):
        np.testing.assert_allclose(outputs[1][row, :length], outputs[0][row, :length], atol=2e-6)
        np.testing.assert_allclose(outputs[2][row, :length], outputs[0][row, :length], atol=0.02)


def long_sequences():
    first, _, third = Shape().sequences()
    return [[x[:70] for x in first], third]


def test_eight_devices_at_once():
    """No caller waits for a thread that another one holds."""
    whole = run(Shape(), PLAIN, mixed())

    def on(device):
        with jax.default_device(device):
            return run(Shape(), PLAIN, mixed())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(on, jax.devices()):
            np.testing.assert_array_equal(result, whole)


def test_pages_stay_in_place():
    """Temporaries do not grow with the pool, in a step and in a loop of steps."""

    def step(x, pages, position):
        batch = ragged_row(position, pages.v.shape[0])
        out, pages = attention(x, x[:, :2], x[:, :2], batch, pages, PLAIN)
        return out, pages

    def loop(x, pages, position):
        def body(carry):
            x, pages, position = carry
            return *step(x, pages, position), position + 1

        return jax.lax.while_loop(lambda carry: carry[2] < 9, body, (x, pages, position))

    for program in (step, loop):
        for dtype in DTYPES:
            temporaries = []
            for count in (10, 1000):
                pages = init_pages(count, 16, 2, 32, jnp.dtype(dtype), kernel=True)
                arguments = (jnp.zeros((1, 6, 32)), pages, jnp.asarray(0, jnp.int32))
                compiled = jax.jit(program, donate_argnums=1).lower(*arguments).compile()
                memory = compiled.memory_analysis()
                temporaries.append(memory.temp_size_in_bytes)
                assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
            assert temporaries[0] == temporaries[1]


def ragged_row(position, pages):
    """One token of one slot that has the first ten pages."""
    batch = ragged([(0, 0)], jnp.arange(10, dtype=jnp.int32).reshape(1, 1, 10) % pages)
    return dataclasses.replace(batch, positions=position[None])


def test_pages_without_a_kernel():
    for pages in (
        init_pages(3, 16, 2, 32, jnp.float32),
        init_pages(3, 8, 2, 32, jnp.float32, kernel=True),
        init_pages(3, 16, 2, 10, jnp.float32, kernel=True),
        init_pages(3, 16, 2, 32, jnp.float16, kernel=True),
    ):
        assert not pages.kernel
        assert pages.k.shape == pages.v.shape == (3, pages.k.shape[1], 2, pages.k.shape[3])


def test_a_model_decodes_over_kernel_pages():
    """Prompt, then token by token: the logits of the whole sequence at once."""
    config = ModelConfig(
        family="gemma2", vocab_size=61, d_model=24, d_ff=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        max_seq_len=64, windows=(None, 5), rope=Rope(), attention_softcap=5.0,
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 20))
    table = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32).reshape(2, 2), (len(config.window_kinds), 2, 2))
    cache = init_cache(config, (4, 4), 16, jnp.float32, kernel=True)
    hidden, cache = model.forward(Batch.dense(jnp.asarray(tokens[:, :15]), page_table=table), cache)
    logits = [model.logits(hidden).reshape(2, 15, -1)]
    for position in range(15, 20):
        batch = Batch.decode(jnp.asarray(tokens[:, position]), jnp.full(2, position, jnp.int32), table)
        hidden, cache = model.forward(batch, cache)
        logits.append(model.logits(hidden)[:, None])
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), model(tokens), atol=2e-5)


def test_heads_shared_out_by_shard_map():
    """Each device has its own heads, of queries and of pages."""
    shape = Shape(heads=8, kv_heads=4)
    q, k, v = (jnp.asarray(x) for x in shape.sequences()[0])
    batch = ragged([(0, p) for p in range(150)], jnp.arange(10, dtype=jnp.int32).reshape(1, 1, 10))
    pages = init_pages(10, 16, 4, 32, jnp.float32, kernel=True)
    whole, _ = attend(q, k, v, batch, pages, spec=PLAIN)
    heads = P(None, "tensor")  # the second axis, of pages too
    shards = jax.shard_map(
        lambda q, k, v, batch, pages: attention(q, k, v, batch, pages, PLAIN),
        mesh=jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(heads, heads, heads, P(), heads),
        out_specs=(heads, heads),
    )
    np.testing.assert_array_equal(jax.jit(shards)(q, k, v, batch, pages)[0], whole)


def test_shapes_that_do_not_go_together_are_refused():
    pages = init_pages(1, 16, 2, 32, jnp.float32, kernel=True)
    batch = ragged([(0, 0)], jnp.zeros((1, 1, 1), jnp.int32))
    zeros = lambda heads, width=32: jnp.zeros((1, heads, width))
    with pytest.raises(ValueError, match="cannot keep keys"):
        attention(zeros(4), zeros(4), zeros(4), batch, pages, PLAIN)
    with pytest.raises(ValueError, match="do not go with keys"):
        attention(zeros(3), zeros(2), zeros(2), batch, pages, PLAIN)
