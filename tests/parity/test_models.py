"""The comparison of `tests/models/test_golden.py`, live, on other tokens: torch runs beside JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from tests import families

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def oracle():
    """The functions that made the recordings; imported here, where torch is sure to be wanted."""
    from tests.golden import make

    return make


@pytest.fixture(scope="module", params=families.TINY)
def pair(request, oracle, tmp_path_factory):
    """Our model and transformers' from one directory, and the model's name."""
    directory = tmp_path_factory.mktemp(request.param)
    families.write(request.param, directory)
    model, _ = checkpoints.load(directory, dtype=jnp.float32)
    return model, oracle.load(directory), request.param


def test_recordings_are_current(pair, oracle):
    _, reference, name = pair
    golden = families.golden(name)
    assert families.relative_error(oracle.logits(reference, golden["tokens"]), golden["logits"]) < 1e-5


def test_logits(pair, oracle):
    model, reference, _ = pair
    tokens = np.random.default_rng(1).integers(model.config.vocab_size, size=(3, 75))
    assert families.relative_error(model(tokens), oracle.logits(reference, tokens)) < 1e-4


def test_greedy_tokens(pair, oracle):
    model, reference, _ = pair
    prompt, expected, _ = oracle.continuation(reference, np.random.default_rng(1))
    (result,) = jo.generate(model, None, [prompt.tolist()], max_tokens=64, temperature=0.0, ignore_eos=True)
    assert result.token_ids == expected.tolist()
