"""Pages are written in place: what a step needs beside its arguments does not grow with them."""

import dataclasses

import jax
import pytest

from jaxopt_llm.engine import Engine, EngineConfig, inputs
from jaxopt_llm.engine.step import step
from tests.engine import oracle

PROMPTS, DECODE = inputs.Shape(2, 32, 1, False), inputs.Shape(2, 2, 4, False)


def analysis(shape, pages, page_size, dtype):
    """Of the compiled step, and the bytes of its cache."""
    sizes = EngineConfig(
        max_slots=2, max_seq_len=64, cache_tokens=pages * page_size, page_size=page_size, cache_dtype=dtype
    )
    engine = Engine(oracle.wide(), None, sizes)
    runner, loop = engine._runner, engine._loop
    batch = inputs.idle(shape, loop._widths, loop._schedulers[0].page_table)
    program = dataclasses.replace(runner._program, steps=shape.steps)
    compiled = step.lower((runner._weights.leaves, ()), runner._state, batch, program=program).compile()
    return compiled.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(runner._state.cache))


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("page_size", [16, 8], ids=["kernel", "jax.numpy"])
@pytest.mark.parametrize(
    "shape", [inputs.Shape(2, 32, 1, False), inputs.Shape(2, 2, 4, False)], ids=["prompts", "decode"]
)
def test_temporaries_do_not_grow_with_the_pages(shape, page_size, dtype):
    (small, few), (large, many) = (analysis(shape, count, page_size, dtype) for count in (64, 640))
    assert many > 5 * few
    assert large.temp_size_in_bytes == small.temp_size_in_bytes
    assert large.alias_size_in_bytes - small.alias_size_in_bytes == many - few


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4 * 32), ("int8", 32 + 4)])
def test_bytes_of_a_token(dtype, width):
    """Two layers of two key/value heads; codes with their scale."""
    sizes = EngineConfig(max_slots=2, max_seq_len=64, cache_dtype=dtype)
    assert Engine(oracle.wide(), None, sizes).kv_bytes_per_token == 2 * 2 * 2 * width
