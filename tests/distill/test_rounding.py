"""Quantization-aware distillation: what products see, which gradients come back, what is stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.distill import Distillation, LoRA, Model, Optimizer, Student, log
from jaxopt_llm.distill.rounding import straight_through
from jaxopt_llm.distill.step import Trainer
from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import quantizable, weights
from tests.distill.conftest import halved
from tests.distill.test_run import TINY, run

FORMAT = "int3_g32_zero"
AWARE = dataclasses.replace(TINY, quantize=FORMAT, steps=12, optimizer=Optimizer(learning_rate=3e-3))


def test_the_gradient_is_that_of_the_rounded_weight():
    w, format = jax.random.normal(jax.random.key(0), (8, 64)), quantization_format(FORMAT)
    rounded = format.quantize(w).dequantize(jnp.float32)
    value, gradient = jax.value_and_grad(lambda w: jnp.sin(straight_through(format, w)).sum())(w)
    assert value == pytest.approx(float(jnp.sin(rounded).sum()), rel=1e-6)
    np.testing.assert_allclose(gradient, np.cos(np.float64(rounded)), atol=1e-6)
    assert np.abs(rounded - w).max() > 0.1


def test_a_step_moves_floats_as_a_plain_one_moves_rounded_weights(teacher, student, text):
    """Adam's first step depends on the gradient alone."""
    ids = student.tokenizer.encode(text[:4000], add_special=False)
    tokens = np.asarray(ids[:64], np.int32).reshape(1, 2, 32)
    counted = np.ones(tokens.shape, bool)
    plain = Model(jo.quantize(student.model, FORMAT), student.tokenizer)
    plain = jo.from_params(
        student.model.config,
        {
            name: value.dequantize(jnp.float32) if isinstance(value, QArray) else value
            for name, value in weights(plain.model).items()
        },
    )

    def stepped(learner, config):
        trainer = Trainer(learner, teacher.model, config)
        before = jax.tree.map(np.array, learner.params)
        state, measured = trainer.step(trainer.start(), tokens, counted)
        return jax.tree.map(lambda new, old: np.asarray(new) - old, state.student, before), measured

    aware, seen = stepped(Student.of(student.model, quantize=FORMAT), AWARE)
    expected, wanted = stepped(Student.of(plain), dataclasses.replace(AWARE, quantize=None))
    assert float(seen["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
    assert float(seen["gradient_norm"]) == pytest.approx(float(wanted["gradient_norm"]), rel=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, aware, expected)


def test_a_student_learns_to_make_up_for_rounding(teacher, student, text, tmp_path):
    outcome = run(teacher, student, text, tmp_path, AWARE)
    ids = student.tokenizer.encode(text[8000:9000], add_special=False)
    rounded = evaluate.perplexity(jo.quantize(student.model, FORMAT), ids, window=64, windows=2)
    losses = [row["loss"] for row in log.read(tmp_path)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert outcome.perplexity_after < 0.9 * rounded.perplexity
    for name, value in weights(outcome.model).items():
        assert isinstance(value, QArray) == quantizable(name, value.shape)
        assert not isinstance(value, QArray) or value.bits == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize": "int5"}, "unknown quantization 'int5'"),
        ({"quantize": "int8", "lora": LoRA()}, "which lora leaves as they are; take one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_widths_that_groups_do_not_divide_are_named(student):
    with pytest.raises(ValueError, match=r"mlp\.down\.weight has 32 input features, which groups of 64"):
        Student.of(halved(student.model), quantize="int3_g64_zero")
