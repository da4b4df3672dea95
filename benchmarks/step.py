"""The engine's decode step on the device that is there: GPU, TPU or CPU. Needs this checkout and JAX, no model.

    python -m benchmarks.step --shape=llama3-8b --random_weights --quantize=none,int8,int4 --batch=1,8,64
    python -m benchmarks.step --shape=smollm2-135m --dtype=float32 --batch=1,8  # on a CPU

Weights of the shape are drawn on the device. For each form of them and each batch, every sequence has `--context`
tokens in the cache and decodes `--steps` tokens in one dispatch, as the engine does when nothing waits. MBU is the
bytes of weights and cache that a step has to read, MFU the operations that it has to do, over its time and what a copy
(or reading alone, if that is faster) and a matrix product reach in the same run. A CPU's core reads and writes at once,
so there it is reading alone that counts. Prints a table and writes benchmarks/results/step.json, or another `--name`
(`--nosave`: prints that too).
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.record import record
from jaxopt_llm.engine import EngineConfig, inputs
from jaxopt_llm.engine.runner import Runner
from jaxopt_llm.evaluate.timing import read_bandwidth
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import (
    ModelConfig,
    Rope,
    Transformer,
    abstract,
    from_params,
    num_bytes,
    num_params,
    quantizable,
    specs,
)
from jaxopt_llm.sharding.chips import chip_of


def _llama(layers: int, **sizes: Any) -> ModelConfig:
    windows = (None,) * layers
    return ModelConfig(
        family="llama", num_layers=layers, windows=windows, rope=Rope(), max_seq_len=8192, **sizes
    )


SHAPES = {
    "llama3-8b": _llama(
        32, vocab_size=128256, d_model=4096, d_ff=14336, num_heads=32, num_kv_heads=8, head_dim=128
    ),
    "llama3.2-1b": _llama(
        16, vocab_size=128256, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=8, head_dim=64, tied=True
    ),
    "smollm2-135m": _llama(
        30, vocab_size=49152, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, head_dim=64, tied=True
    ),
    "tiny": _llama(2, vocab_size=256, d_model=64, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=32),
}
_SHAPE = flags.DEFINE_enum("shape", "llama3-8b", list(SHAPES), "Of the model.")
_RANDOM = flags.DEFINE_bool("random_weights", True, "Draw the weights; there are no others here.")
_QUANTIZE = flags.DEFINE_list("quantize", ["none", "int8", "int4"], f"none, {', '.join(FORMATS)}.")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "64"], "Sequences that decode together.")
_CONTEXT = flags.DEFINE_integer("context", 512, "Tokens of each sequence in the cache.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of a dispatch.", lower_bound=1)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 16, "Tokens of a page.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of floats and of the cache.")
_NAME = flags.DEFINE_string("name", "step", "Of the file with the result.")
_SAVE = flags.DEFINE_bool("save", True, "Write the result; else print it.")
flags.register_validator("random_weights", lambda yes: yes, "this script has no other weights")
flags.register_validator(
    "quantize", lambda names: all(n == "none" or n in FORMATS for n in names), "unknown form of weights"
)
flags.register_validator(
    "batch", lambda sizes: all(n.isdecimal() and int(n) > 0 for n in sizes), "batches are numbers"
)


def random_model(config: ModelConfig, format: str, dtype: jnp.dtype) -> Transformer:
    """Weights drawn where they stay, one array at a time."""
    key = jax.random.key(0)
    values = {}
    for number, (name, spec) in enumerate(specs(abstract(config, dtype)).items()):
        shape: Any = jax.ShapeDtypeStruct(spec.shape, dtype)
        if format != "none" and quantizable(name, spec.shape):
            shape = FORMATS[format].shapes(spec.shape)
        own = jax.random.fold_in(key, number)
        values[name] = jax.tree.map(lambda leaf, own=own: _noise(own, leaf.shape, leaf.dtype), shape)
    return from_params(config, values, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating):
        return (0.02 * jax.random.normal(key, shape)).astype(dtype)
    return jax.random.bits(key, shape, jnp.uint8).view(dtype)


def seconds(run: Callable[[], Any], *, calls: int = 4, repeats: int = 5) -> float:
    """Of one call among several that follow each other; the median of a few such rows, after a warm-up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def limits(dtype: jnp.dtype) -> tuple[float, float]:
    """Bytes a second of reading, or on an accelerator of a copy if that is more; operations a second of a product."""
    small = jax.default_backend() == "cpu"
    array = jnp.zeros(2 ** (26 if small else 28), jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> jax.Array:
        nonlocal array
        array = add(array)
        return array

    side = 1024 if small else 8192
    square = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    reading = read_bandwidth()
    bandwidth = reading if small else max(reading, 2 * array.nbytes / seconds(copy))
    return bandwidth, 2 * side**3 / seconds(lambda: product(square, square))


def decoding(config: ModelConfig, sizes: Any, shape: inputs.Shape, context: int) -> inputs.Inputs:
    """Every row at the same place, with pages of its own."""
    rows, count = shape.rows, -(-sizes.max_seq_len // sizes.page_size)
    pages = np.arange(rows * count, dtype=np.int32).reshape(rows, count)
    table = np.stack([pages % most for most in sizes.num_pages])
    ids = np.arange(rows, dtype=np.int32)
    empty = inputs.idle(shape, inputs.Widths(sizes.max_slots, config.vocab_size, 1), table)
    return dataclasses.replace(
        empty,
        tokens=ids % config.vocab_size,
        positions=np.full(rows, context, np.int32),
        rows=ids,
        slots=ids,
        kv_len=np.full(rows, context + 1, np.int32),
        query_start=np.arange(rows + 1, dtype=np.int32),
        num_rows=np.int32(rows),
        page_table=table,
        limit=np.full(rows, shape.steps, np.int32),
    )


def measure(
    model: Transformer,
    batch: int,
    *,
    context: int,
    steps: int,
    page_size: int,
    bandwidth: float,
    flops: float,
) -> dict[str, float]:
    """One batch.

    Args:
      model: on one device.
      batch: sequences.
      context: tokens of each before the first step.
      steps: of the dispatch.
      page_size: tokens of a page.
      bandwidth, flops: what the device reaches, of `limits`.
    """
    config = model.config
    length = -(-(context + steps) // page_size) * page_size
    engine = EngineConfig(
        max_slots=batch,
        max_seq_len=length,
        cache_tokens=batch * length,
        page_size=page_size,
        decode_steps=steps,
    )
    sizes = engine.scheduler(config)
    shape = inputs.Shape(batch, batch, steps, False)
    runner = Runner(model, engine)
    work = decoding(config, sizes, shape, context)
    taken = seconds(lambda: runner.run([work], steps=steps, full=False)) / steps
    table = model.embed.weight.get_value()
    unread = (
        (0, 0) if config.tied else (table.nbytes, np.prod(table.shape))
    )  # of the table a step reads a row
    nbytes = num_bytes(model) - unread[0] + batch * context * runner.kv_bytes_per_token
    attention = 4 * config.num_layers * config.q_width * context
    operations = batch * (2 * (num_params(model) - int(unread[1])) + attention)
    return {
        "ms_per_step": taken * 1e3,
        "tokens_per_s": batch / taken,
        "mbu": nbytes / taken / bandwidth,
        "mfu": operations / taken / flops,
    }


def main(argv: Sequence[str]) -> None:
    del argv
    config, dtype = SHAPES[_SHAPE.value], jnp.dtype(_DTYPE.value)
    bandwidth, flops = limits(dtype)
    device = jax.devices()[0]
    chip = chip_of(device)
    print(f"{device.device_kind}: moves {bandwidth / 1e9:.0f} GB/s, multiplies {flops / 1e12:.2f} TFLOP/s")
    if chip is not None:
        print(f"published: {chip.hbm_bandwidth / 1e9:.0f} GB/s, {chip.bf16_flops / 1e12:.0f} TFLOP/s")
    print(f"{'weights':10} {'batch':>5} {'ms a step':>10} {'tokens/s':>9} {'MBU':>6} {'MFU':>6}")
    runs = []
    for format in _QUANTIZE.value:
        model = random_model(config, format, dtype)
        for batch in map(int, _BATCH.value):
            found = measure(
                model, batch,
                context=_CONTEXT.value, steps=_STEPS.value, page_size=_PAGE_SIZE.value,
                bandwidth=bandwidth, flops=flops,
            )  # fmt: skip
            runs.append({"quantize": format, "batch": batch, **found})
            ms, rate, mbu, mfu = found.values()
            print(f"{format:10} {batch:5} {ms:10.3f} {rate:9.0f} {mbu:6.1%} {mfu:6.1%}", flush=True)
        del model
    results = {
        "shape": _SHAPE.value,
        "bytes_per_s": bandwidth,
        "product_flops": flops,
        "context": _CONTEXT.value,
        "runs": runs,
    }
    if _SAVE.value:
        record(_NAME.value, results)
    else:
        print(json.dumps(results))


if __name__ == "__main__":
    app.run(main)
