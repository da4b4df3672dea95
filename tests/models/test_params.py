"""Parameters as a pytree: in, out, exchanged and on a mesh."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_llm as jo
from jaxopt_llm import engine
from jaxopt_llm.kernels import quantization_format
from jaxopt_llm.models import (
    Transformer,
    abstract,
    mesh_of,
    num_bytes,
    num_params,
    place,
    specs,
    weights,
    widest_mesh,
    with_weights,
)
from jaxopt_llm.models.families import parse_config
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests import families

FAMILIES = ["mistral", "gemma3_text", "gpt_oss", "olmo2"]


@pytest.fixture(scope="module")
def model():
    return two_layers("mistral")


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_without_values_are_those_of_a_model(name):
    """Graph and parameters, as `nnx.eval_shape` finds them of a model with random weights."""
    config = parse_config(families.recorded(name)["config"])
    made = nnx.eval_shape(lambda: Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    (graph, shapes), (other, expected) = nnx.split(abstract(config, jnp.bfloat16)), nnx.split(made)
    assert graph == other
    leaf = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(leaf, jax.tree.leaves(shapes)) == jax.tree.map(leaf, jax.tree.leaves(expected))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 97, (4, 24)))


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize("shape", [dict, nested])
def test_from_params(model, shape):
    mine = jo.from_params(model.config, shape(weights(model)))
    np.testing.assert_array_equal(mine(TOKENS), model(TOKENS))


def test_all_problems_are_listed(model):
    tree = weights(model)
    del tree["embed.weight"]
    tree |= {"extra": jnp.zeros(3), "final_norm.weight": jnp.zeros(7)}
    with pytest.raises(ValueError, match=r"missing embed\.weight") as caught:
        jo.from_params(model.config, tree)
    assert "unexpected extra (3,)" in str(caught.value)
    assert "final_norm.weight has shape (7,), the config wants (40,)" in str(caught.value)


def test_with_weights_leaves_the_original(model):
    before = model(TOKENS)
    changed = with_weights(model, {"embed.weight": jnp.zeros((97, 40))})
    assert abs(changed(TOKENS) - before).max() > 1e-3
    np.testing.assert_array_equal(model(TOKENS), before)


def test_with_weights_refuses_what_does_not_fit(model):
    values = {"embed.wieght": jnp.zeros((97, 40)), "final_norm.weight": jnp.zeros(7)}
    with pytest.raises(ValueError, match=r"unexpected embed\.wieght \(97, 40\)") as caught:
        with_weights(model, values)
    assert "final_norm.weight has shape (7,), the config wants (40,)" in str(caught.value)


@pytest.mark.parametrize("tokens", [jnp.arange(3), jnp.zeros((1, 2, 3), int)])
def test_the_call_wants_rows_of_tokens(model, tokens):
    call = inspect.unwrap(Transformer.__call__)  # the tests' own type checker would come first
    with pytest.raises(ValueError, match=r"tokens has shape .*, not \[B, T\]"):
        call(model, tokens)


def test_apply_is_the_call(model):
    graph, params = nnx.split(model)
    logits = model(TOKENS)
    compiled = jax.jit(jo.apply, static_argnums=0)(graph, params, TOKENS)
    np.testing.assert_allclose(compiled, logits, atol=1e-5 * abs(logits).max())


def test_counts(model):
    values = weights(model)
    assert num_params(model) == sum(value.size for value in values.values())
    assert num_bytes(model) == 4 * num_params(model)


def two_layers(name):
    """A family's model with random weights and one layer of each kind, where it has two."""
    config = parse_config(families.TINY[name])
    kinds = sorted({config.kind(i): i for i in range(config.num_layers)}.values())
    layers = (kinds * 2)[:2]
    experts = config.experts and dataclasses.replace(config.experts, layers=(True, True))
    windows = tuple(config.windows[i] for i in layers)
    return Transformer(
        dataclasses.replace(config, num_layers=2, windows=windows, experts=experts), rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_mesh_gives_what_one_device_gives(name):
    """Logits, gradients and greedy tokens under automatic partitioning, data=2 x tensor=4."""
    model = two_layers(name)
    sharding = Sharding(MeshSpec.parse("data=2,tensor=4").build(), model.config.units)
    placed = place(model, sharding)
    split = [w for w in jax.tree.leaves(weights(placed)) if not w.sharding.is_fully_replicated]
    assert len(split) > len(specs(model)) / 3
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 97, (4, 24)))
    spread = jax.device_put(tokens, NamedSharding(sharding.mesh, P("data")))
    loss = lambda model, tokens: -jax.nn.log_softmax(model(tokens)[:, :-1])[..., 5].mean()
    run = nnx.jit(lambda model, tokens: (model(tokens), nnx.grad(loss)(model, tokens)))
    (logits, gradient), (split_logits, split_gradient) = run(model, tokens), run(placed, spread)
    np.testing.assert_allclose(split_logits, logits, atol=1e-4 * abs(logits).max())
    for one, many in zip(jax.tree.leaves(gradient), jax.tree.leaves(split_gradient), strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5 + 1e-4 * abs(one).max())
    ask = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    prompts = [tokens[0, :5].tolist(), tokens[1, :11].tolist()]
    alone, together = (engine.generate(m, None, prompts, **ask) for m in (model, placed))
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_groups_must_not_straddle_shards(model):
    quantized = with_weights(
        model, {"layers.0.mlp.down.weight": jo.QArray(jnp.zeros((40, 72), jnp.int8), jnp.ones((40, 9)))}
    )
    sharding = Sharding(MeshSpec.parse("tensor=4").build(), model.config.units)
    message = "layers.0.mlp.down.weight has 9 groups of 8, which mesh tensor=4 does not divide"
    with pytest.raises(ValueError, match=message):
        place(quantized, sharding)


@pytest.mark.parametrize(
    ("sizes", "format", "devices", "tensor"),
    [
        ({"num_heads": 8, "num_kv_heads": 4, "d_ff": 96}, None, 8, 8),
        ({"num_heads": 8, "num_kv_heads": 4, "d_ff": 96}, "int8", 7, 4),
        (
            {"num_heads": 8, "num_kv_heads": 4, "d_ff": 96},
            "int8_block",
            8,
            1,
        ),  # three groups, three shards: 8 heads
        ({"num_heads": 9, "num_kv_heads": 3, "d_ff": 96}, "int8_block", 8, 3),
        ({"num_heads": 8, "num_kv_heads": 4, "d_ff": 96}, None, 1, 1),
    ],
)
def test_the_widest_mesh_is_one_that_a_model_can_be_placed_on(model, sizes, format, devices, tensor):
    config = dataclasses.replace(model.config, d_model=64, head_dim=32, **sizes)
    rounding = format and quantization_format(format)
    mesh = widest_mesh(config, devices, rounding)
    assert mesh == MeshSpec(tensor=tensor)

    def take(tensor):
        place(abstract(config, rounding=rounding), Sharding(MeshSpec(tensor=tensor).build(), config.units))
        config.kv_heads_of_shard(tensor)

    take(tensor)
    for more in range(tensor + 1, devices + 1):
        with pytest.raises(ValueError, match=r"divide|groups"):
            take(more)


def test_where_a_model_lies(model):
    mesh = MeshSpec.parse("tensor=2").build()
    assert mesh_of(model) is None
    assert mesh_of(place(model, Sharding(mesh, model.config.units))) == mesh
