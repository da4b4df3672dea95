"""Every family gives transformers' logits and greedy tokens, as `tests/golden/` has them on record."""

import jax.numpy as jnp
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.models.families import parse_config
from tests import families


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
    forward = nnx.jit(lambda model, tokens: model(tokens))  # compiles in half the time that eager calls take
    assert families.relative_error(forward(model, golden["tokens"]), golden["logits"]) < 1e-4


def test_greedy_tokens(tiny):
    model, golden = tiny
    (result,) = jo.generate(
        model, None, [golden["prompt"].tolist()], max_tokens=64, temperature=0.0, ignore_eos=True
    )
    assert result.token_ids == golden["greedy"].tolist()
