"""What matters: by hand from captured activations, and by what was planted in a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.models import weights, with_weights
from jaxopt_llm.prune import Importance, Kept, Shape, choose, cut, importance
from tests import exportable

IDS = np.random.default_rng(0).integers(3, 90, (3, 16))


@pytest.fixture(scope="module")
def model():
    return exportable.model("llama_bias", num_hidden_layers=2)


@pytest.fixture(scope="module")
def scores(model):
    return importance(model, IDS, without_layers=True)


@pytest.fixture(scope="module")
def seen(model):
    """What the parts of a model give, float64."""
    names = ("embed", "layers.*", "layers.*.mlp.gate", "layers.*.mlp.up", "layers.*.*_norm", "final_norm")
    return {name: np.asarray(x, np.float64) for name, x in jo.capture(model, *names)(IDS)[1].items()}


def joined(magnitudes):
    """The mean over a sequence's tokens, then the norm over sequences."""
    return np.sqrt(np.square(magnitudes.mean(1)).sum(0))


def test_channels_by_what_down_reads(scores, seen):
    for layer in range(2):
        gate, up = (seen[f"layers.{layer}.mlp.{part}"] for part in ("gate", "up"))
        np.testing.assert_allclose(
            scores.mlp[layer], joined(np.abs(gate / (1 + np.exp(-gate)) * up)), rtol=1e-5
        )


def test_width_by_what_all_norms_give(scores, seen):
    expected = sum(joined(np.abs(x)) for name, x in seen.items() if name.endswith("norm"))
    np.testing.assert_allclose(scores.embed, expected, rtol=1e-5)


def test_hidden_states_alike(scores, seen):
    states = [
        seen[name] / np.linalg.norm(seen[name], axis=-1, keepdims=True)
        for name in ("embed", "layers.0", "layers.1")
    ]
    expected = [[np.mean(np.sum(a * b, -1)) for b in states] for a in states]
    np.testing.assert_allclose(scores.similarity, expected, atol=1e-6)


def test_a_head_by_the_norm_of_what_it_gives(model, scores):
    """A model whose values of one group are doubled: so are the norms of its heads in the first layer."""
    config = model.config
    doubled = {
        name: jnp.concatenate([2 * value[: config.head_dim], value[config.head_dim :]])
        for name, value in weights(model).items()
        if name.startswith("layers.0.attention.v")
    }
    found = importance(with_weights(model, doubled), IDS).heads[0] / scores.heads[0]
    group = config.num_heads // config.num_kv_heads
    np.testing.assert_allclose(found, [2.0] * group + [1.0] * (config.num_heads - group), rtol=1e-5)


def test_perplexity_without_each_layer(model, scores):
    alone = evaluate.perplexity(cut(model, Kept(layers=[1])), IDS.reshape(-1), window=16)
    assert scores.perplexity[0] == pytest.approx(alone.perplexity, rel=1e-6)


def test_scores_are_read_as_they_were_written(scores, tmp_path):
    scores.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    for field in dataclasses.fields(scores):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(scores, field.name))
        assert getattr(again, field.name).dtype == np.float32


def test_dead_parts_go_first(model):
    """Channels, a head and a feature that write nothing are those that are cut: the logits stay."""
    config, values = model.config, {name: np.array(value) for name, value in weights(model).items()}
    for layer in range(2):
        for leaf in ("weight", "bias"):
            values[f"layers.{layer}.mlp.up.{leaf}"][5:20] = 0
    dead = with_weights(model, {name: jnp.asarray(value) for name, value in values.items()})
    shape = Shape(d_ff=config.d_ff - 15)
    kept = choose(importance(dead, IDS), config, shape)
    np.testing.assert_allclose(cut(dead, kept)(IDS), dead(IDS), atol=1e-5)


def of(layers=4, **scores):
    """Made-up scores of four layers, six heads in three groups."""
    plain = {
        "mlp": np.ones((layers, 8)),
        "heads": np.ones((layers, 6)),
        "embed": np.ones(8),
        "similarity": np.eye(layers + 1),
    }
    return Importance(**{name: np.asarray(value, np.float32) for name, value in (plain | scores).items()})


CONFIG = dataclasses.replace(
    exportable.config("llama"), num_layers=4, windows=(None,) * 4, num_kv_heads=3, d_model=8, d_ff=8
)


def test_the_best_of_each_group():
    heads = np.tile([3.0, 1, 5, 6, 0, 2], (4, 1))
    assert choose(of(heads=heads), CONFIG, Shape(num_heads=3)).heads[0] == [0, 3, 5]
    assert choose(of(heads=heads), CONFIG, Shape(num_heads=4, num_kv_heads=2)).heads[0] == [0, 1, 2, 3]
    assert choose(of(heads=heads), CONFIG, Shape(num_heads=1, num_kv_heads=1)).heads[0] == [3]


def test_layers_go_by_influence_block_or_perplexity():
    similarity = np.eye(5)
    for i, j, cosine in (
        (0, 1, 0.1),
        (1, 2, 0.9),
        (2, 3, 0.5),
        (3, 4, 0.95),
        (0, 2, 0.2),
        (1, 3, 0.8),
        (2, 4, 0.3),
    ):
        similarity[i, j] = similarity[j, i] = cosine
    scores = of(similarity=similarity, perplexity=[9.0, 30.0, 20.0, 10.0])
    shape = Shape(num_layers=2)
    assert choose(scores, CONFIG, shape).layers == [0, 2]
    assert choose(scores, CONFIG, shape, depth="block").layers == [0, 3]
    assert choose(scores, CONFIG, shape, depth="perplexity").layers == [1, 2]


def test_scores_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="without each layer was not measured; measure with without_layers=True"
    ):
        choose(of(), CONFIG, Shape(num_layers=2), depth="perplexity")
    with pytest.raises(ValueError, match="measure it on this model"):
        choose(of(layers=3), CONFIG, Shape())
    jo.checkpoints.write_weights(tmp_path / "other.safetensors", {"embed": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"holds \['embed'\], which are no importance scores"):
        Importance.load(tmp_path / "other.safetensors")


def test_scores_that_are_no_numbers_are_refused(model):
    broken = with_weights(model, {"layers.0.mlp.up.bias": jnp.full(model.config.d_ff, jnp.inf)})
    with pytest.raises(ValueError, match="the importance of mlp is not finite"):
        importance(broken, IDS)
