"""Every family gives transformers' logits and greedy tokens, as `tests/golden/` has them on record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.models.families import parse_config
from tests import families

FORWARD = nnx.jit(lambda model, tokens: model(tokens))  # compiles in half the time that eager calls take


@pytest.fixture(scope="module", params=families.TINY)
def tiny(request, tmp_path_factory):
    """A loaded model and what transformers made of the same files."""
    directory = tmp_path_factory.mktemp(request.param)
    families.write(request.param, directory)
    model, _ = checkpoints.load(directory, dtype=jnp.float32)
    return model, families.golden(request.param)


def test_recordings_are_those_of_the_configs():
    assert {path.stem for path in families.GOLDEN.glob("*.npz")} == set(families.TINY)
    for name, config in families.TINY.items():
        assert families.recorded(name)["config"] == config, f"run `python -m tests.golden.make {name}`"


@pytest.mark.parametrize("name", families.TINY)
def test_transformers_5_words_its_configs_otherwise(name):
    """transformers' own logits are the same under both files: `make.py` checks it."""
    recorded = families.recorded(name)
    assert parse_config(recorded["config_5"]) == parse_config(recorded["config"])


def test_logits(tiny):
    model, golden = tiny
    assert families.relative_error(FORWARD(model, golden["tokens"]), golden["logits"]) < 1e-4


def test_greedy_tokens(tiny):
    """Step by step from the cache: the same tokens, and the log-probabilities of the whole forward."""
    model, golden = tiny
    (result,) = jo.generate(
        model, None, [golden["prompt"].tolist()], max_tokens=64, temperature=0.0, ignore_eos=True, logprobs=0
    )
    assert result.token_ids == golden["greedy"].tolist()
    sequence = np.concatenate([golden["prompt"], result.token_ids])[: golden["tokens"].shape[1]]
    logits = FORWARD(model, np.broadcast_to(sequence, golden["tokens"].shape))[0]
    whole = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    first = len(golden["prompt"])
    stepwise = np.array([entry.logprob for entry in result.logprobs])[: len(sequence) - first]
    expected = whole[np.arange(first, len(sequence)) - 1, sequence[first:]]
    np.testing.assert_allclose(stepwise, expected, atol=1e-4 * abs(logits).max())
