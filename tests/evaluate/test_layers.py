"""Errors of single layers, against the layers called one by one in float64 NumPy's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.models import weights, with_weights
from tests.engine import oracle

TOKENS = np.arange(3, 35, dtype=np.int32)


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")[0]


def noisy(model, *names):
    noise = lambda w: w + 0.05 * jax.random.normal(jax.random.key(1), w.shape)
    return with_weights(model, {name: noise(weights(model)[name]) for name in names})


def test_only_the_layer_that_differs_has_an_error(stories):
    """What it gives to later layers counts there as it would be without."""
    found = evaluate.layer_errors(noisy(stories, "layers.2.mlp.down.weight"), stories, TOKENS)
    assert found.shape == (stories.config.num_layers,)
    assert found[2] > 1e-3
    assert np.delete(found, 2).max() < 1e-6


def test_the_error_is_relative_to_what_the_layer_adds(stories):
    """The last layer's output projections doubled: it adds twice what it did in the feed-forward part."""
    name = "layers.4.mlp.down.weight"
    double = with_weights(stories, {name: 2 * weights(stories)[name]})
    _, seen = jo.capture(stories, "layers.3", "layers.4", "layers.4.mlp")(jnp.asarray(TOKENS[None]))
    before, after, fed = (
        np.asarray(seen[name], np.float64) for name in ("layers.3", "layers.4", "layers.4.mlp")
    )
    length = lambda x: np.linalg.norm(x, axis=-1)
    expected = (length(fed) / length(after - before)).mean()
    found = evaluate.layer_errors(double, stories, TOKENS)
    assert found[4] == pytest.approx(expected, rel=1e-4)


def test_an_embedding_that_is_scaled():
    """Gemma: the first layer reads the embedding times the root of the width."""
    model = oracle.tiny("gemma2")
    zeros = {
        name: jnp.zeros_like(w)
        for name, w in weights(model).items()
        if name.startswith("layers.0.") and "post_norm" in name
    }
    offset = 1.0 if model.config.norm_offset else 0.0
    silent = with_weights(model, {name: w - offset for name, w in zeros.items()})
    found = evaluate.layer_errors(silent, model, TOKENS)
    assert found[0] == pytest.approx(1, rel=1e-4), "a layer that adds nothing"
    assert found[1:].max() < 1e-6


def test_layers_that_do_not_correspond(stories):
    with pytest.raises(ValueError, match="layers are compared of models with one number, width and vocab"):
        evaluate.layer_errors(stories, oracle.tiny("llama"), TOKENS)
