"""A tiny trained teacher, and a student with half of its feed-forward channels."""

import dataclasses

import jax
import pytest

import jaxopt_llm as jo
from jaxopt_llm.distill import Model
from jaxopt_llm.models import Transformer, weights


def halved(model: Transformer) -> Transformer:
    """Every other feed-forward channel."""
    kept = {}
    for name, value in weights(model).items():
        if ".mlp." in name:
            value = value[:, ::2] if ".down." in name else value[::2]
        kept[name] = value
    return jo.from_params(dataclasses.replace(model.config, d_ff=len(kept["layers.0.mlp.up.weight"])), kept)


@pytest.fixture(autouse=True)
def _promotion():
    """optax takes a float to the power of an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def teacher(data_dir) -> Model:
    return Model(*jo.load(data_dir / "stories107K.gguf"))


@pytest.fixture(scope="session")
def student(teacher) -> Model:
    return Model(halved(teacher.model), teacher.tokenizer)


@pytest.fixture(scope="session")
def text(data_dir) -> str:
    return (data_dir / "wikitext.txt").read_text("utf-8")
