"""What a device has of a model: against models that are really placed, published counts and formulas."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.kernels import quantization_format
from jaxopt_llm.models import abstract, init_cache, place, quantizable, specs, with_weights
from jaxopt_llm.sharding import MeshSpec, Sharding
from jaxopt_llm.size.model import Shapes, Share
from tests import families
from tests.size.configs import llama, mixtral


def config_of(name, tmp_path):
    families.write(name, tmp_path)
    return jo.checkpoints.read_config(tmp_path)[0]


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", "data=2"),
        ("mixtral", "tensor=2"),
        ("gemma3", "tensor=2"),
        ("qwen3_moe", "data=2,tensor=2"),
        ("mistral", "tensor=4"),  # more shards than key/value heads
    ],
)
def test_bytes_are_those_of_a_placed_model(name, mesh, weights, tmp_path):
    config, spec = config_of(name, tmp_path), MeshSpec.parse(mesh)
    model = abstract(config, jax.numpy.bfloat16)
    if weights != "bf16":
        form = quantization_format(weights)
        shapes = {n: form.shapes(s.shape) for n, s in specs(model).items() if quantizable(n, s.shape)}
        model = with_weights(model, shapes)
    placed = place(model, Sharding(spec.build(), config.units))
    leaves = jax.tree.leaves(nnx.state(placed))
    expected = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
    )
    assert Share.of(Shapes.of(config), spec, weights).weight_bytes == expected


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [(llama(), 8_030_261_248, 8_030_261_248), (mixtral(), 46_702_792_704, 12_879_925_248)],
    ids=["llama", "mixtral"],
)
def test_published_counts(config, parameters, active):
    """The counts that Meta and Mistral give (8.03B; 46.7B, of which 12.9B take part in a token)."""
    share = Share.of(Shapes.of(config), MeshSpec())
    assert share.weight_bytes == 2 * parameters
    table = config.vocab_size * config.d_model
    vectors = (2 * config.num_layers + 1) * config.d_model  # gains of norms multiply no matrix
    assert share.token_flops + share.row_flops == 2 * (active - table - vectors)


def test_causal_attention_takes_half_of_the_square():
    """2 L N H T^2 for T tokens, of which half are masked; a window bounds what is left."""
    share = Share.of(Shapes.of(llama()), MeshSpec())
    assert share.attention_flops(0, 4096) == pytest.approx(2 * 32 * 32 * 128 * 4096**2, rel=1e-3)
    halves = share.attention_flops(0, 2048) + share.attention_flops(2048, 2048)
    assert halves == share.attention_flops(0, 4096)
    windowed = Share.of(Shapes.of(llama(windows=(None, 128) * 16)), MeshSpec())
    assert windowed.attention_flops(8192, 1) == 4 * 32 * 128 * 16 * (8193 + 128)


@pytest.mark.parametrize(("kv", "dtype"), [("bf16", "bfloat16"), ("int8", "int8")])
@pytest.mark.parametrize("tensor", [1, 4, 8, 16])
def test_cache_bytes_are_those_of_the_engine(kv, dtype, tensor):
    """Of 8 key/value heads, 16 shards have one each: half of them copies."""
    config = llama(2)
    cache = jax.eval_shape(lambda: init_cache(config, (4,), 16, jax.numpy.dtype(dtype), shards=tensor))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    share = Share.of(Shapes.of(config), MeshSpec(tensor=tensor), kv=kv)
    assert share.context_bytes(64) == held


def test_experts_that_a_step_touches():
    """Against drawing them."""
    share = Share.of(Shapes.of(mixtral()), MeshSpec())
    generator = np.random.default_rng(0)
    for tokens in (1, 4, 16):
        drawn = [
            len({e for _ in range(tokens) for e in generator.choice(8, 2, replace=False)})
            for _ in range(2000)
        ]
        touched = (share.read_bytes(tokens) - share.dense_bytes) / share.expert_bytes
        assert touched == pytest.approx(np.mean(drawn) / 8, rel=0.02)


@pytest.mark.parametrize(
    ("mesh", "weights", "kv", "message"),
    [
        (
            "tensor=3",
            "bf16",
            "bf16",
            r"layers\.0\.attention.*tensor=3 does not divide heads=32; tensor may be \[2, 4",
        ),
        ("expert=2", "bf16", "bf16", "not yet over expert"),
        ("tensor=2", "int7", "bf16", "int7"),
        ("tensor=2", "bf16", "int4", "keys and values are bf16 or int8"),
    ],
)
def test_what_is_refused(mesh, weights, kv, message):
    with pytest.raises(ValueError, match=message):
        Share.of(Shapes.of(llama(2)), MeshSpec.parse(mesh), weights, kv)


def test_layers_of_two_kinds_are_both_counted():
    experts = dataclasses.replace(mixtral().experts, layers=(False, True) * 16)
    mixed = Share.of(Shapes.of(llama(vocab_size=32000, experts=experts)), MeshSpec()).weight_bytes
    dense = Share.of(Shapes.of(llama(vocab_size=32000)), MeshSpec()).weight_bytes
    assert mixed == (dense + Share.of(Shapes.of(mixtral()), MeshSpec()).weight_bytes) // 2
