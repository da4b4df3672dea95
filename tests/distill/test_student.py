"""What is trained of a student: adapters beside weights, plain and quantized, and how they are saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.distill import LoRA, Model, Student, distill
from jaxopt_llm.models import weights
from tests.distill.test_run import TINY

RANK2 = dataclasses.replace(TINY, lora=LoRA(rank=2, alpha=8.0))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_adapters_are_trained_alone_and_read_back(quantize, teacher, student, text, tmp_path):
    own = Model(jo.quantize(student.model, quantize), student.tokenizer) if quantize else student
    before = jax.tree.map(jnp.copy, weights(own.model))
    found = distill(
        teacher, own, RANK2, texts=[text[:8000]], held_out=text[8000:9000], folder=tmp_path / "run"
    )
    assert found.perplexity_after < found.perplexity_before
    jax.tree.map(np.testing.assert_array_equal, weights(own.model), before)
    checkpoints.export_adapter(student.model.config, found.adapters, tmp_path / "adapter", alpha=8.0)
    if quantize is None:
        merged = checkpoints.load_adapter(tmp_path / "adapter").merge(student.model)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
        jax.tree.map(close, weights(merged), weights(found.model))


def test_an_adapted_model_is_the_merged_one(student):
    parts = Student.of(student.model, lora=LoRA(rank=2, targets=("q", "down")))
    noise = iter(jax.random.split(jax.random.key(0), len(parts.params)))
    params = {name: 0.1 * jax.random.normal(next(noise), value.shape) for name, value in parts.params.items()}
    tokens = np.arange(20, dtype=np.int32)[None]
    adapted, merged = parts.model(params, parts.frozen)(tokens), parts.merged(params, jnp.float32)(tokens)
    np.testing.assert_allclose(adapted, merged, atol=1e-4)
    assert not np.allclose(merged, student.model(tokens), atol=1e-2)
    assert {name.split(".")[-3] for name in params} == {"q", "down"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "rounded weights cannot be trained; set lora"),
        (LoRA(merge=True), "set lora.merge=false"),
        (LoRA(targets=("router",)), r"targets=\('router',\) name no product"),
    ],
)
def test_what_cannot_be_trained_is_refused(lora, message, student):
    with pytest.raises(ValueError, match=message):
        Student.of(jo.quantize(student.model, "int8"), lora=lora)
