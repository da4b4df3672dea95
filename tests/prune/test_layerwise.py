"""Sparse models: which weights are zero, and that each product sees the sparse ones before it."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.models import quantizable, weights
from jaxopt_llm.prune import Sparsity, sparse, sparsify
from tests import exportable

IDS = np.random.default_rng(0).integers(3, 90, (3, 16))


@pytest.fixture(scope="module")
def model():
    return exportable.model("llama_bias", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sparse_models(model):
    return {method: sparsify(model, "2:4", method, ids=IDS) for method in ("magnitude", "wanda", "sparsegpt")}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_products_of_layers_are_sparse_and_nothing_else(model, sparse_models, method):
    for name, value in weights(sparse_models[method]).items():
        if name.startswith("layers.") and quantizable(name, value.shape):
            zeros = np.asarray(value == 0).reshape(len(value), -1, 4).sum(-1)
            assert (zeros == 2).all(), name
        else:
            assert value is weights(model)[name] or np.array_equal(value, weights(model)[name]), name


@pytest.mark.parametrize(("product", "norm"), [("attention.q", "attention_norm"), ("mlp.up", "mlp_norm")])
def test_a_product_sees_what_the_sparse_ones_before_it_give(model, sparse_models, product, norm):
    """In the second layer, by Wanda: those of the first layer, and attention before the feed-forward."""
    name, place = f"layers.1.{product}.weight", f"layers.1.{norm}"
    x = jo.capture(sparse_models["wanda"], place)(IDS)[1][place]
    norms = jnp.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0)
    expected = sparse.wanda(weights(model)[name], norms, Sparsity.parse("2:4"))
    np.testing.assert_array_equal(weights(sparse_models["wanda"])[name], expected)


def test_what_is_made_up_for_comes_nearer(model, sparse_models):
    exact = model(IDS)
    off = {method: float(jnp.square(small(IDS) - exact).mean()) for method, small in sparse_models.items()}
    assert off["sparsegpt"] < off["wanda"] < off["magnitude"]


@pytest.mark.parametrize(
    ("name", "sparsity", "method", "message"),
    [
        ("mixtral", 0.5, "magnitude", "mixtral has experts, whose inputs are not observed"),
        (
            "llama_bias",
            "2:5",
            "magnitude",
            r"layers\.0\.attention\.q\.weight has 48 input features, which groups of 5",
        ),
        ("llama_bias", 0.5, "wanda", "method='wanda' needs a calibration text"),
        ("llama_bias", 1.5, "wanda", "sparsity='1.5' must be a share between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(name, sparsity, method, message):
    with pytest.raises(ValueError, match=message):
        sparsify(exportable.model(name), sparsity, method)
