"""A tiny model, and a text of random ids."""

import numpy as np
import pytest
from flax import nnx

from jaxopt_llm.models import ModelConfig, Rope, Transformer


@pytest.fixture(scope="session")
def model():
    config = ModelConfig(
        family="llama",
        vocab_size=50,
        d_model=32,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=64,
        windows=(None, None, None),
        rope=Rope(),
        tied=True,
    )
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def ids():
    return np.random.default_rng(0).integers(0, 50, (3, 16)).astype(np.int32)
