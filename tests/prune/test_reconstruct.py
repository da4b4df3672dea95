"""What stays makes up for what goes: least squares in float64, and a pruned model nearer to the whole one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.models import weights
from jaxopt_llm.prune import Kept, cut, reconstruct
from jaxopt_llm.prune.reconstruct import least_squares
from tests import exportable

RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 90, (4, 24))


@pytest.fixture(scope="module")
def model():
    return exportable.model("llama_bias", num_hidden_layers=2)


@pytest.fixture(scope="module")
def kept(model):
    config = model.config
    group = config.num_heads // config.num_kv_heads
    heads = range(0, config.num_heads, group)
    return Kept(heads=[list(heads)] * 2, mlp=[list(range(0, config.d_ff, 2)), list(range(1, config.d_ff, 2))])


def test_the_closed_form_is_the_least_squares_solution():
    x, w, kept = (
        RNG.normal(size=(200, 12)) @ RNG.normal(size=(12, 12)),
        RNG.normal(size=(5, 12)),
        [0, 3, 4, 7, 10],
    )
    expected, *_ = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)
    found = least_squares(*(jnp.asarray(a, jnp.float32) for a in (w, x.T @ x)), jnp.asarray(kept), 0.0)
    np.testing.assert_allclose(found[:, jnp.asarray(kept)], expected.T, rtol=2e-3, atol=2e-3)
    assert not np.delete(np.asarray(found), kept, axis=1).any()


def test_damping_pulls_to_the_weights_as_they_are():
    x, w = RNG.normal(size=(50, 6)), RNG.normal(size=(3, 6)).astype(np.float32)
    found = least_squares(jnp.asarray(w), jnp.asarray(x.T @ x, jnp.float32), jnp.arange(4), 1e6)
    np.testing.assert_allclose(found[:, :4], w[:, :4], rtol=1e-4, atol=1e-4)


def test_it_is_nearer_than_what_is_only_cut(model, kept):
    small, plain = reconstruct(model, kept, IDS), cut(model, kept)
    exact, off = model(IDS), lambda other: float(jnp.square(other(IDS) - exact).mean())
    assert small.config == plain.config
    assert off(small) < 0.8 * off(plain)


def test_down_sees_what_the_new_o_gives(model):
    """In the first layer, solved in float64 on what the model gives whose heads alone are pruned."""
    mlp = list(range(0, model.config.d_ff, 2))
    heads = Kept(layers=[0], heads=[[0, 2]])
    both = reconstruct(model, dataclasses.replace(heads, mlp=[mlp]), IDS, damping=1e-6)
    _, seen = jo.capture(
        reconstruct(model, heads, IDS, damping=1e-6), "layers.0.mlp.gate", "layers.0.mlp.up"
    )(IDS)
    x = np.asarray(jax.nn.silu(seen["layers.0.mlp.gate"]) * seen["layers.0.mlp.up"], np.float64)
    x = x.reshape(-1, model.config.d_ff)
    w = np.asarray(weights(model)["layers.0.mlp.down.weight"], np.float64)
    solution, *_ = np.linalg.lstsq(x[:, mlp], x @ w.T, rcond=None)
    np.testing.assert_allclose(x[:, mlp] @ solution, _down(both, x[:, mlp]), atol=1e-3)


def _down(model, x):
    return x @ np.asarray(weights(model)["layers.0.mlp.down.weight"], np.float64).T


def test_what_does_not_fit_is_refused_before_the_text_is_read(model):
    with pytest.raises(ValueError, match=r"mlp\[0\]=\[0, 0\] must be ascending"):
        reconstruct(model, Kept(mlp=[[0, 0], [0, 1]]), np.full((1, 4), 10**6))
