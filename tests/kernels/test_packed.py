"""Packed weights: against the operations that they fuse, with kernels and without."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.kernels import FORMATS, QArray, embed, linear, pack, quantization_format, rms_norm
from jaxopt_llm.kernels.cpu.panels import Panels

P = jax.sharding.PartitionSpec
PLATFORMS = ("cpu", "tpu")  # with kernels, where they were built; and without


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def block(seed, outputs, inputs=64):
    return FORMATS["int8_block"].quantize(normal(seed, outputs, inputs) * 0.2)


@pytest.fixture(params=["float", "int8", "int8_block", "w8a8", "fp8", "int3_g32_zero"])
def weights(request):
    """A few of one input, whose outputs are no multiple of anything."""
    plain = [normal(seed, outputs, 64) * 0.2 for seed, outputs in enumerate((37, 5, 22))]
    return (
        plain if request.param == "float" else [quantization_format(request.param).quantize(w) for w in plain]
    )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_fused_outputs_follow_one_another(weights, platform):
    x, gain, bias = normal(7, 9, 64), normal(8, 64), normal(9, 64)
    p = pack(weights, norm=(gain, 1e-5), bias=bias, platform=platform)
    assert p.shape == (64, 64)
    y = jnp.concatenate([linear(rms_norm(x, gain, eps=1e-5), w) for w in weights], axis=-1) + bias[None]
    np.testing.assert_allclose(jax.jit(linear)(x, p), y, atol=0.05 if platform == "cpu" else 1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", [*FORMATS, "int4_g64_zero", "int8_g32_zero", "int3_g32", "int3_g64_min"])
def test_gate(name, platform):
    gate, up = (quantization_format(name).quantize(normal(seed, 37, 64) * 0.2) for seed in (0, 1))
    x = normal(2, 5, 64)
    y = linear(x, pack([gate, up], gate="silu", platform=platform))
    np.testing.assert_allclose(y, jax.nn.silu(linear(x, gate)) * linear(x, up), atol=1e-4)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_embed_reads_what_was_packed(weights, platform):
    ids = jnp.asarray([[3, 0, 21], [4, 3, 16]])
    for w in weights:
        rows = jnp.minimum(ids, w.shape[0] - 1)
        found = embed(rows, pack([w], platform=platform), jnp.bfloat16)
        np.testing.assert_array_equal(found, embed(rows, w, jnp.bfloat16))


@pytest.mark.parametrize("minimum", [False, True])
def test_embed_reads_four_bits(minimum):
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.integers(0, 256, (40, 32), np.uint8))
    scale, bias = (jnp.asarray(rng.normal(size=(40, 2)), jnp.float16) for _ in range(2))
    w = QArray(data, scale, bias if minimum else None, bits=4)
    ids = jnp.arange(40)
    np.testing.assert_array_equal(embed(ids, pack([w]), jnp.float32), w.dequantize())


def test_panels_of_a_gate_are_read_in_order():
    halves = [block(seed, 37) for seed in (0, 1)]
    p = pack(halves, gate="silu")
    expected = jnp.concatenate([w.dequantize() for w in halves])
    np.testing.assert_array_equal(embed(jnp.arange(74), p, jnp.float32), expected)


def test_bytes_stay_small():
    inputs = 256
    four = QArray(jnp.zeros((64, inputs // 2), jnp.uint8), *jnp.zeros((2, 64, 8), jnp.float16), bits=4)
    assert pack([block(0, 64, inputs)]).nbytes == 64 * inputs * 1.0625
    assert pack([four]).nbytes == 64 * inputs * 0.625


def test_forms_without_kernel_stay_as_they_are():
    assert isinstance(pack([block(0, 8)]).parts[0], Panels)
    odd = QArray(jnp.zeros((8, 64), jnp.int8), jnp.ones((8, 8)))  # groups of 8
    for other in (normal(0, 8, 64), odd):
        assert pack([other]).parts == (other,)
        panels, alone, last = pack([block(0, 8), other, block(1, 8)]).parts
        assert isinstance(panels, Panels)
        assert alone is other
        assert isinstance(last, Panels)


@pytest.mark.parametrize(
    ("shapes", "gate", "message"),
    [
        (((8, 64), (8, 32)), None, "need one input"),
        (((8, 64), (9, 64)), "silu", "two weights of equal shape"),
        (((2, 8, 64), (3, 8, 64)), None, "need one input"),
        (((8, 64), (8, 64)), "relu", "known are silu, gelu, gelu_tanh"),
    ],
)
def test_what_does_not_go_together_is_refused(shapes, gate, message):
    with pytest.raises(ValueError, match=message):
        pack([FORMATS["int8_block"].quantize(normal(0, *shape)) for shape in shapes], gate=gate)


def test_other_uses_are_refused():
    p = pack([block(0, 8)])
    with pytest.raises(ValueError, match="63 input features but w has 64"):
        linear(jnp.zeros((2, 63)), p)
    with pytest.raises(ValueError, match="2 were packed together"):
        embed(jnp.zeros(1, jnp.int32), pack([normal(0, 8, 64)] * 2), jnp.float32)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda x: linear(x, p).sum())(jnp.ones((2, 64)))


def mesh():
    return jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))


def test_packing_and_product_inside_a_shard_map():
    """Column-parallel gates, then a row-parallel product: each device packs what it holds."""
    gate, up, down = block(0, 256), block(1, 256), block(2, 40, 256)
    x = normal(3, 5, 64)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(P(), P("tensor"), P("tensor"), P(None, "tensor")),
        out_specs=P(),
    )
    def feed_forward(x, gate, up, down):
        hidden = linear(x, pack([gate, up], gate="silu"))
        return jax.lax.psum(linear(hidden, pack([down])), "tensor")

    hidden = jax.nn.silu(linear(x, gate)) * linear(x, up)
    np.testing.assert_allclose(feed_forward(x, gate, up, down), linear(hidden, down), atol=0.02)


def test_packed_weights_pass_into_loops():
    p = pack([block(0, 64)])
    x = normal(1, 3, 64)

    @jax.jit
    def three_times(x, p):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(linear(x, p)), x)

    step = lambda x: jnp.tanh(linear(x, p))
    np.testing.assert_allclose(three_times(x, p), step(step(step(x))), atol=1e-5)


def test_what_one_shard_map_packs_another_reads():
    """As an engine does: packed once, with local shapes, and read at each step."""
    w, x = block(0, 8 * 24), normal(1, 3, 64)
    shard = functools.partial(jax.shard_map, mesh=mesh(), out_specs=P("tensor"))
    packed = jax.jit(shard(lambda w: pack([w]), in_specs=P("tensor")))(w)
    assert packed.shape == (24, 64)
    read = shard(lambda x, p: linear(x, p).T, in_specs=(P(), P("tensor")))
    np.testing.assert_array_equal(jax.jit(read)(x, packed), linear(x, pack([w])).T)


def test_eight_devices_at_once():
    """None waits for another, and all get their own results."""
    products = [pack([block(seed, 1000, 576)]) for seed in range(8)]
    x = normal(9, 13, 576)
    expected = [np.asarray(linear(x, p)) for p in products]
    placed = [jax.device_put((x, p), d) for p, d in zip(products, jax.devices(), strict=True)]
    call = jax.jit(linear)
    wrong = []

    def work(index):
        for _ in range(20):
            if not np.array_equal(call(*placed[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
