"""Tiny models, and a text of random ids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_llm.models import ModelConfig, Rope, Transformer, weights, with_weights

CONFIG = ModelConfig(
    family="llama",
    vocab_size=50,
    d_model=32,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    windows=(None, None),
    rope=Rope(),
    tied=True,
)
_RICH = {"norm_offset": 1.0, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "qk_norm": "head"}


def made(**settings):
    """A model whose every parameter is noise: gains and biases differ between channels."""
    model = Transformer(dataclasses.replace(CONFIG, **settings), rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    noise = lambda value: jnp.asarray(0.3 * random.standard_normal(value.shape), jnp.float32)
    return with_weights(model, {name: value + noise(value) for name, value in weights(model).items()})


@pytest.fixture(scope="session")
def model():
    return made()


@pytest.fixture(scope="session")
def rich():
    """Biases, norms of queries and keys, gains stored less one, a norm behind each part as well."""
    return made(post_norm=True, **_RICH)


@pytest.fixture(scope="session")
def post_normed():
    """Norms behind what they normalise alone."""
    return made(pre_norm=False, post_norm=True)


@pytest.fixture(scope="session")
def ids():
    return np.random.default_rng(0).integers(0, 50, (2, 16)).astype(np.int32)
