"""Captured activations are those the model computes; replacing them changes what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.kernels import linear
from jaxopt_llm.models import Experts, ModelConfig, Rope, Transformer

CONFIG = ModelConfig(
    family="qwen3_moe",
    vocab_size=61,
    d_model=24,
    d_ff=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    windows=(None, 5, None),
    rope=Rope(),
    qk_norm="head",
    experts=Experts(count=4, per_token=2, d_ff=12, layers=(False, True, False)),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def test_capture_by_pattern(model):
    logits, seen = jo.capture(model, "layers.*.attention.o", "layers.1.moe", "final_norm", "embed")(TOKENS)
    np.testing.assert_array_equal(logits, model(TOKENS))
    outputs = [f"layers.{i}.attention.o" for i in range(3)]
    assert sorted(seen) == sorted(["embed", "final_norm", "layers.1.moe", *outputs])
    assert all(value.shape == (2, 9, 24) for value in seen.values())
    np.testing.assert_array_equal(seen["embed"], model.embed.weight.get_value()[TOKENS])
    head = linear(seen["final_norm"], model.head.weight.get_value())
    np.testing.assert_allclose(head, logits, atol=1e-6)


def test_a_star_stands_for_one_part(model):
    _, seen = jo.capture(model, "layers.*")(TOKENS)
    assert sorted(seen) == ["layers.0", "layers.1", "layers.2"]


def test_a_layer_is_the_sum_of_its_parts(model):
    parts = ("layers.1", "layers.2.attention", "layers.2.mlp", "layers.2")
    _, seen = jo.capture(model, *parts)(TOKENS)
    total = seen["layers.1"] + seen["layers.2.attention"] + seen["layers.2.mlp"]
    np.testing.assert_allclose(seen["layers.2"], total, atol=1e-6)


def test_replacement_steers_what_follows(model):
    before = model(TOKENS)
    erased, seen = jo.capture(model, "layers.0", replace={"layers.0": jnp.zeros_like})(TOKENS)
    assert not seen["layers.0"].any()
    assert abs(erased - before).max() > 1e-3
    np.testing.assert_array_equal(model(TOKENS), before)
    swapped = jo.capture(model, replace={"layers.2": lambda x: x[::-1]})(TOKENS)[0]
    np.testing.assert_array_equal(swapped, before[::-1])


def test_under_jit_with_gradients(model):
    """A steering vector found by optax through the frozen model."""
    graph, params = nnx.split(model)

    @jax.jit
    def loss(vector):
        steered = jo.capture(nnx.merge(graph, params), replace={"layers.1": lambda x: x + vector[None, None]})
        return -jax.nn.log_softmax(steered(TOKENS)[0])[..., 7].mean()

    slope = jax.jit(jax.grad(loss))
    optimizer = optax.adam(0.1)
    vector = jnp.zeros(24)
    state = optimizer.init(vector)
    start = loss(vector)
    for _ in range(30):
        gradient = slope(vector)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = optimizer.update(gradient, state)
        vector = optax.apply_updates(vector, updates)
    assert loss(vector) < start - 0.1


@pytest.mark.parametrize(
    ("patterns", "replace", "message"),
    [
        (["layer.*"], {}, r"no activation is named 'layer\.\*'; names are .*layers\.\*\.mlp\.down"),
        (["layers.1.moe.down"], {}, "no activation is named"),
        ([], {"layers.9": jnp.zeros_like}, "no activation is named 'layers.9'"),
    ],
)
def test_unknown_names_are_refused(model, patterns, replace, message):
    with pytest.raises(ValueError, match=message):
        jo.capture(model, *patterns, replace=replace)


def test_replacement_keeps_the_dtype():
    """A float32 steering vector leaves the rest of a bfloat16 model in bfloat16."""
    half = Transformer(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    steer = lambda x: x.astype(jnp.float32) + 1.0
    _, seen = jo.capture(half, "layers.*", "final_norm", replace={"layers.0": steer})(TOKENS)
    assert {name: x.dtype for name, x in seen.items()} == dict.fromkeys(seen, jnp.bfloat16)


def test_replacement_must_keep_the_shape(model):
    with pytest.raises(ValueError, match=r"the replacement of layers.1 gave shape \(2, 9, 3\)"):
        jo.capture(model, replace={"layers.1": lambda x: x[..., :3]})(TOKENS)
