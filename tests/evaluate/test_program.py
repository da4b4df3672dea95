"""The reader of compiled programs, on programs compiled here for the CPU and for a TPU."""

import jax
import jax.numpy as jnp
import pytest

from jaxopt_llm.evaluate.program import operations
from jaxopt_llm.sharding import topologies

ROWS, INNER, OUTER, TABLE = 8, 512, 1024, 2**18
PLACES = ["cpu", "v5e"]


def program(function, *shapes, place, donate=()):
    device = jax.devices("cpu")[0] if place == "cpu" else topologies.tpu(place)[0]
    where = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    text = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text()
    return operations(text)


def total(found, what):
    return sum(getattr(one, what) for one in found)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_product(place, dtype):
    """Its weight is read once, codes as codes where the dequantized weight is none of the arrays."""

    def scoped(x, w):
        with jax.named_scope("mlp"):
            return jnp.tanh(jax.lax.dot_general(x, w.astype(x.dtype), (((1,), (1,)), ((), ()))))

    found = program(scoped, ((ROWS, INNER), jnp.float32), ((OUTER, INNER), dtype), place=place)
    assert total(found, "flops") == 2 * ROWS * INNER * OUTER
    assert any("mlp" in one.scope for one in found)
    weight = jnp.dtype(dtype).itemsize * OUTER * INNER
    if place == "cpu":  # XLA:CPU may write a copy of another dtype, and reads that again
        assert total(found, "read") >= weight
        return
    assert total(found, "read") == pytest.approx(weight, rel=0.05)
    assert total(found, "written") == 4 * ROWS * OUTER
    made = [
        shape for one in found if not one.opcode.endswith("-start") for shape in one.outputs if shape.main
    ]
    assert [shape.dims for shape in made] == [(ROWS, OUTER)]


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_a_table_and_an_update_in_place(place):
    def both(table, ids, cache, x):
        return table[ids] * 2, cache.at[ids].set(x, mode="drop", unique_indices=True)

    shapes = [((TABLE, INNER), jnp.float32), ((ROWS,), jnp.int32), ((TABLE, INNER), jnp.float32)]
    found = program(both, *shapes, ((ROWS, INNER), jnp.float32), place=place, donate=2)
    some = 4 * ROWS * INNER
    assert total(found, "read") < 8 * some < 4 * TABLE * INNER
    assert 2 * some <= total(found, "written") < 8 * some


@pytest.mark.parametrize("place", PLACES)
def test_a_loop_counts_once(place):
    def loop(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    square = ((OUTER, OUTER), jnp.float32)
    found = program(loop, ((ROWS, OUTER), jnp.float32), square, ((), jnp.int32), place=place)
    (turn,) = [one for one in found if one.opcode == "while"]
    assert turn.flops == 2 * ROWS * OUTER * OUTER
    assert total(found, "flops") == turn.flops


GPU_TEXT = """HloModule jit_f, is_scheduled=true

%row (table: f32[64,32], id: s32[]) -> f32[1,32] {
  %table = f32[64,32]{1,0} parameter(0)
  %id = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,32]{1,0} dynamic-slice(%table, %id, %zero), dynamic_slice_sizes={1,32}
}

%large (large_in: (f32[64,32])) -> f32[64,32] {
  %large_in = (f32[64,32]{1,0}) parameter(0)
  %whole = f32[64,32]{1,0} get-tuple-element(%large_in), index=0
  ROOT %negated = f32[64,32]{1,0} negate(%whole)
}

%none (none_in: (f32[64,32])) -> f32[64,32] {
  %none_in = (f32[64,32]{1,0}) parameter(0)
  ROOT %same = f32[64,32]{1,0} get-tuple-element(%none_in), index=0
}

ENTRY %main (x: f32[64,32], i: s32[], which: pred[]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %which = pred[] parameter(2)
  %start = ((f32[64,32]{1,0}, s32[]), f32[1,32]{1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%row
  %done = f32[1,32]{1,0} fusion-done(%start)
  %both = (f32[64,32]{1,0}) tuple(%x)
  ROOT %picked = f32[64,32]{1,0} conditional(%which, %ORDER
}
"""


@pytest.mark.parametrize("first", [True, False])
def test_branches_and_fusions_as_a_gpu_has_them(first):
    """A conditional with its branches by name, of which it does the larger, and a fusion that runs beside others."""
    one, other = ("large", "none") if first else ("none", "large")
    order = f"both, %both), true_computation=%{one}, false_computation=%{other}"
    start, done, picked = operations(GPU_TEXT.replace("ORDER", order))
    assert (start.read, start.written, done.read, done.written) == (128 + 4, 0, 0, 128)
    assert (picked.read, picked.written) == (64 * 32 * 4, 64 * 32 * 4)


def test_other_text():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        operations("module @jit_f {\n}")
