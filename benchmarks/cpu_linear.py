"""How close the CPU kernels come to what the machine can do.

    python -m benchmarks.cpu_linear [--formats=int8_block,int4] [--repeats=30]

One row against the read bandwidth measured beside it, many rows in operations (two a weight and row), and all linear
layers of SmolLM2-135M as one program. Medians, with the bandwidth before and after, so that a busy machine shows; with
JAXOPT_CPU_THREADS=1 processor time is what one core takes, however busy the others are. Prints lines, writes nothing.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxopt_llm.kernels import Packed, QArray, linear, pack
from jaxopt_llm.kernels.cpu import library

_FORMATS = flags.DEFINE_list("formats", ["int8_block", "int4", "int8", "q6_k"], "Which forms of weights.")
_REPEATS = flags.DEFINE_integer("repeats", 30, "Runs of each figure.", lower_bound=3)
_ROWS = flags.DEFINE_list("rows", ["1", "8", "512"], "Rows of the whole stack.")

SHAPES = ((8192, 2048), (2048, 8192), (49152, 576), (3072, 576), (960, 576), (576, 1536))
D, F, L, V, QKV = 576, 1536, 30, 49152, (576, 192, 192)  # SmolLM2-135M


def weight(form: str, outputs: int, inputs: int) -> QArray:
    """Random codes: the values do not matter to the time."""
    rng = np.random.default_rng(0)
    block = (outputs, inputs // 32)
    scale = jnp.full(block, 1e-3, jnp.float16)
    if form == "int4":
        codes = jnp.asarray(rng.integers(0, 256, (outputs, inputs // 2), np.uint8))
        return QArray(codes, scale, scale, bits=4, act=(8, 32))
    codes = jnp.asarray(rng.integers(-127, 128, (outputs, inputs), np.int8))
    if form == "int8":
        return QArray(codes, jnp.full((outputs, 1), 1e-3))
    if form == "q6_k":
        return QArray(codes, jnp.full((outputs, inputs // 16), 1e-3), act=(8, 32))
    return QArray(codes, scale, act=(8, 32))


def seconds(run: Callable[[], object], most: float = 3.0) -> tuple[float, float]:
    """Median time of a call: on the wall, and of all threads together."""
    jax.block_until_ready(run())
    wall, processor = [], []
    end = time.perf_counter() + most
    while len(wall) < 3 or (len(wall) < _REPEATS.value and time.perf_counter() < end):
        before = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - before[0])
        processor.append(time.process_time() - before[1])
    return statistics.median(wall), statistics.median(processor)


def bandwidth() -> float:
    """Bytes a second that a sum of 256 MB reads."""
    big = jnp.ones(2**26, jnp.float32)
    total = jax.jit(lambda x: x.reshape(2, -1).sum(1))
    return big.nbytes / seconds(lambda: total(big))[0]


def touched(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x`, at next to no cost not before `y` is there."""
    return x.at[0, 0].add(1e-9 * y[0, 0])


@jax.jit
def chain(x: jax.Array, copies: tuple[Packed, ...]) -> jax.Array:
    """One product after another, so that dispatch does not count and weights come from memory."""
    for w in copies:
        x = touched(x, linear(x, w))
    return x


def shape_line(form: str, outputs: int, inputs: int) -> str:
    packed = pack([weight(form, outputs, inputs)])
    copies = max(1, 2**28 // packed.nbytes)
    distinct = tuple(jax.tree.map(jnp.array, packed) for _ in range(copies))
    one, many = (jnp.ones((rows, inputs)) for rows in (1, 512))
    stream = seconds(lambda: chain(one, distinct))[0] / copies
    compute = seconds(lambda: chain(many, (packed,) * 4))[0] / 4
    rate, operations = packed.nbytes / stream, 2 * 512 * outputs * inputs / compute
    return f"{form:12} [{outputs:5}, {inputs:4}] {rate / 1e9:6.1f} GB/s {operations / 1e9:7.0f} GOP/s"


def stack(form: str) -> tuple[tuple[tuple[Packed, ...], ...], Packed]:
    """SmolLM2's layers as the engine packs them, and its head."""
    norm = (jnp.ones(D), 1e-5)

    def layer() -> tuple[Packed, ...]:
        return (
            pack([weight(form, outputs, D) for outputs in QKV], norm=norm),
            pack([weight(form, D, D)]),
            pack([weight(form, F, D), weight(form, F, D)], norm=norm, gate="silu"),
            pack([weight(form, D, F)]),
        )

    return tuple(layer() for _ in range(L)), pack([weight(form, V, D)], norm=norm)


@jax.jit
def step(x: jax.Array, layers: Sequence[Sequence[Packed]], head: Packed | None) -> jax.Array:
    """All products of a token's way through the model, and nothing else."""
    for qkv, o, gate_up, down in layers:
        x = touched(x, linear(x, qkv))  # in place of the attention, which reads q, k and v
        x = linear(linear(linear(x, o), gate_up), down)
    return x if head is None else linear(x, head)


def stack_lines(form: str) -> list[str]:
    layers, head = stack(form)
    lines = []
    for rows in map(int, _ROWS.value):
        with_head = head if rows <= 64 else None  # prefill needs the last row's logits alone
        parts = (layers, with_head)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
        x = jnp.ones((rows, D))
        wall, processor = seconds(lambda x=x, parts=parts: step(x, *parts))
        lines.append(
            f"{form:12} SmolLM2 {rows:4} rows {wall * 1e3:8.2f} ms {rows / wall:8.0f} tokens/s "
            f"{nbytes / wall / 1e9:6.1f} GB/s, processor time {processor * 1e3:8.2f} ms"
        )
    return lines


def main(argv: Sequence[str]) -> None:
    print(library.status())
    print(f"read bandwidth {bandwidth() / 1e9:.1f} GB/s")
    for form in _FORMATS.value:
        for outputs, inputs in SHAPES:
            print(shape_line(form, outputs, inputs), flush=True)
        print(*stack_lines(form), sep="\n", flush=True)
        print(f"read bandwidth {bandwidth() / 1e9:.1f} GB/s", flush=True)


if __name__ == "__main__":
    app.run(main)
