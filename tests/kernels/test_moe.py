"""Experts against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxopt_llm.kernels import FORMATS, grouped_linear, moe, pack
from jaxopt_llm.kernels.moe import _blocks, _ragged
from jaxopt_llm.kernels.tpu import megablox


def sizes_of(kind, rows, experts):
    rng = np.random.default_rng(rows)
    if kind == "one":
        return np.eye(experts, dtype=np.int64)[experts // 2] * rows
    return rng.multinomial(rows, rng.dirichlet(np.full(experts, 0.3)))


@pytest.mark.parametrize("path", [_blocks, _ragged, grouped_linear])
@pytest.mark.parametrize("kind", ["uneven", "one"])
@pytest.mark.parametrize("rows", [1, 70])
def test_grouped_linear(path, kind, rows):
    w = jax.random.normal(jax.random.key(0), (5, 6, 32))
    x = jax.random.normal(jax.random.key(1), (rows, 32))
    sizes = sizes_of(kind, rows, 5)
    expert = np.repeat(np.arange(5), sizes)
    expected = np.einsum("mi,moi->mo", np.asarray(x, np.float64), np.asarray(w, np.float64)[expert])
    np.testing.assert_allclose(jax.jit(path)(x, w, jnp.asarray(sizes)), expected, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_paths_agree_on_quantized_experts(name):
    w = FORMATS[name].quantize(jax.random.normal(jax.random.key(0), (5, 6, 32)))
    x = jax.random.normal(jax.random.key(1), (70, 32))
    sizes = jnp.asarray(sizes_of("uneven", 70, 5))
    np.testing.assert_allclose(*(jax.jit(path)(x, w, sizes) for path in (_blocks, _ragged)), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
@pytest.mark.parametrize("kind", ["uneven", "one"])
def test_packed_experts_give_what_is_fused(kind, name, platform):
    """With kernels, where they were built, and without."""
    keys = jax.random.split(jax.random.key(0), 4)
    round_ = FORMATS[name].quantize if name in FORMATS else lambda w: w
    gate, up = (round_(jax.random.normal(key, (5, 22, 64)) * 0.2) for key in keys[:2])
    x, bias = jax.random.normal(keys[2], (70, 64)), jax.random.normal(keys[3], (5, 44))
    sizes = jnp.asarray(sizes_of(kind, 70, 5))
    of_row = bias[np.repeat(np.arange(5), sizes)]
    first, second = (grouped_linear(x, w, sizes) for w in (gate, up))
    packed = pack([gate, up], bias=bias, gate="silu", platform=platform)
    y = jax.jit(grouped_linear)(x, packed, sizes)
    np.testing.assert_allclose(y, jax.nn.silu(first + of_row[:, :22]) * (second + of_row[:, 22:]), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 40, 24), (200, 136, 264)])
def test_the_tpu_kernel_where_it_is_interpreted(rows, outputs, inputs, dtype):
    w = jax.random.normal(jax.random.key(0), (5, outputs, inputs), dtype)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), dtype)
    sizes = sizes_of("uneven", rows, 5)
    expert = np.repeat(np.arange(5), sizes)
    expected = np.einsum("mi,moi->mo", np.asarray(x, np.float64), np.asarray(w, np.float64)[expert])
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(megablox)(x, w, jnp.asarray(sizes))
    assert out.dtype == dtype
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected, atol=1e-4, rtol=0 if dtype == jnp.float32 else 0.01
    )


def test_weighted_sum_and_gradient():
    tokens, experts, chosen = 23, 6, 2
    keys = jax.random.split(jax.random.key(0), 4)
    x, w = jax.random.normal(keys[0], (tokens, 8)), jax.random.normal(keys[1], (experts, 8, 8))
    shares = jax.nn.softmax(jax.random.normal(keys[2], (tokens, chosen)))
    which = jax.vmap(lambda key: jax.random.permutation(key, experts)[:chosen])(
        jax.random.split(keys[3], tokens)
    )

    def ours(w):
        return moe(x, shares, which, lambda rows, _, sizes: grouped_linear(rows, w, sizes), experts)

    def theirs(w):
        return jnp.einsum("tk,td,tkod->to", shares, x, w[which])

    np.testing.assert_allclose(jax.jit(ours)(w), theirs(w), atol=1e-5)
    weight_gradients = [jax.jit(jax.grad(lambda w, f=f: (f(w) ** 2).sum()))(w) for f in (ours, theirs)]
    np.testing.assert_allclose(*weight_gradients, atol=1e-4)
