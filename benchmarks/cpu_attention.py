"""Speed of the CPU attention kernel: decode against the machine's read bandwidth, prefill in GFLOP/s.

    python -m benchmarks.cpu_attention [--dtypes=float32,bfloat16,int8] [--repeats=7]
    JAXOPT_CPU_THREADS=1 python -m benchmarks.cpu_attention --clock=cpu       on a machine that others use

One program runs several steps of every layer of a model one after another, each layer over pages of its own, so that
keys and values come from where a real step finds them. `us`: median of a layer; `gb_per_s`: bytes of keys and values
that it reads by that time; `of_bandwidth`: against NumPy on as many threads, reading as many bytes as all layers hold.
Prints a line a case, then one JSON object, which it also writes into benchmarks/results/. Takes two minutes on two
cores.
"""

import concurrent.futures
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.record import record
from jaxopt_llm.kernels import AttentionSpec, Pages, attention, init_pages
from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.models import Batch

_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16", "int8"], "What pages keep.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each case.", lower_bound=1)
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "What seconds are: passed, or of processors.")
_CONTEXTS = flags.DEFINE_list("contexts", ["128", "512", "1024", "4096"], "Context lengths of decoding.")

_MODELS = {"smollm2-135m": (9, 3, 64, 30), "llama-8b layers": (32, 8, 128, 4)}  # N, K, H, L
_PAGE_SIZE = 16


def main(argv: Sequence[str]) -> None:
    print(library.status(), file=sys.stderr)
    results = []
    for name, (heads, kv_heads, width, layers) in _MODELS.items():
        for dtype in _DTYPES.value:
            case = functools.partial(measure, heads, kv_heads, width, layers, dtype)
            for context in map(int, _CONTEXTS.value):
                results += [{"model": name, **case(slots, context)} for slots in (1, 8)]
                show(results[-2:])
            results.append({"model": name, **case(1, 512, tokens=512)})
            show(results[-1:])
    record(Path(__file__).stem, results)


def measure(
    heads: int, kv_heads: int, width: int, layers: int, dtype: str, slots: int, context: int, tokens: int = 1
) -> dict[str, Any]:
    """The last `tokens` of each slot's context attend."""
    spec = AttentionSpec(scale=width**-0.5)
    each = -(-context // _PAGE_SIZE)
    order = np.random.default_rng(0).permutation(slots * each).reshape(1, slots, each)
    batch = _batch(slots, context, tokens, jnp.asarray(order, jnp.int32))
    fill = lambda a: jnp.full_like(a, 0.01 if a.dtype == jnp.float32 else 1)
    pages = lambda: init_pages(slots * each, _PAGE_SIZE, kv_heads, width, jnp.dtype(dtype), kernel=True)
    cache = tuple(jax.tree.map(fill, pages()) for _ in range(layers))
    q, k, v = (jnp.ones((slots * tokens, n, width)) for n in (heads, kv_heads, kv_heads))

    steps = max(1, 10**8 // (layers * slots * tokens * context * heads * width))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache: tuple[Pages, ...], q: jax.Array, batch: Batch) -> tuple[tuple[Pages, ...], jax.Array]:
        def step(
            _: jax.Array, carry: tuple[tuple[Pages, ...], jax.Array]
        ) -> tuple[tuple[Pages, ...], jax.Array]:
            cache, q = carry
            written = []
            for layer in cache:
                q, layer = attention(q, k, v, batch, layer, spec)
                written.append(layer)
            return tuple(written), q

        return jax.lax.fori_loop(0, steps, step, (cache, q))

    def once() -> None:
        nonlocal cache
        cache, out = run(cache, q, batch)
        out.block_until_ready()

    seconds = median(once) / (layers * steps)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(cache[0])) * context / (each * _PAGE_SIZE)
    result: dict[str, Any] = {"dtype": dtype, "slots": slots, "context": context, "tokens": tokens}
    result["us"] = round(seconds * 1e6, 1)
    if tokens == 1:
        bandwidth = read_bandwidth(int(read * layers))
        result["gb_per_s"] = round(read / seconds / 1e9, 2)
        result["of_bandwidth"] = round(read / seconds / bandwidth, 2)
    else:
        seen = sum(range(context - tokens + 1, context + 1)) * slots
        result["gflop_per_s"] = round(4 * seen * heads * width / seconds / 1e9, 1)
        result["all_layers_ms"] = round(seconds * layers * 1e3, 2)
    return result


def _batch(slots: int, context: int, tokens: int, table: jax.Array) -> Batch:
    ids = np.repeat(np.arange(slots, dtype=np.int32), tokens)
    positions = np.tile(np.arange(context - tokens, context, dtype=np.int32), slots)
    return Batch(
        tokens=jnp.zeros(slots * tokens, jnp.int32),
        positions=jnp.asarray(positions),
        slots=jnp.asarray(ids),
        kv_len=jnp.full(slots, context, jnp.int32),
        query_start=jnp.arange(slots + 1, dtype=jnp.int32) * tokens,
        num_slots=jnp.asarray(slots, jnp.int32),
        page_table=table,
    )


def median(run: Callable[[], None]) -> float:
    """Seconds of a call."""
    clock = time.perf_counter if _CLOCK.value == "wall" else time.process_time
    run()
    samples = []
    for _ in range(_REPEATS.value):
        start = clock()
        run()
        samples.append(clock() - start)
    return statistics.median(samples)


@functools.cache
def read_bandwidth(size: int) -> float:
    """Bytes a second that the threads read together, of `size` bytes again and again."""
    threads = library.load().jaxopt_threads()
    parts = np.array_split(np.ones(max(size, 2**20) // 4, np.float32), threads)
    passes = max(1, 2**28 // size)

    def read(part: np.ndarray) -> None:
        for _ in range(passes):
            part.max()

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        seconds = median(lambda: [None for _ in pool.map(read, parts)] and None)
    return sum(part.nbytes for part in parts) * passes / seconds


def show(results: Sequence[dict[str, Any]]) -> None:
    for result in results:
        print(*(f"{key}={value}" for key, value in result.items()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    app.run(main)
