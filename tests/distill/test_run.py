"""Distillation of a tiny model: what it learns, what it keeps, what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.distill import Distillation, Loss, Model, OnPolicy, Optimizer, Written, distill, log
from jaxopt_llm.models import weights

TINY = Distillation(
    steps=3, batch=2, length=32, save_every=1, window=64, windows=2, optimizer=Optimizer(learning_rate=1e-3)
)


def run(teacher, student, text, folder, config=TINY, **settings):
    train, held_out = text[:8000], text[8000:9000]
    return distill(teacher, student, config, texts=[train], held_out=held_out, folder=folder, **settings)


def test_a_student_learns(teacher, student, text, tmp_path):
    stages, rows = [], []
    config = dataclasses.replace(TINY, steps=12, optimizer=Optimizer(learning_rate=3e-3, ema=0.5))
    outcome = run(
        teacher,
        student,
        text,
        tmp_path,
        config,
        progress=lambda *stage: stages.append(stage),
        told=rows.append,
    )
    assert outcome.teacher_perplexity < outcome.perplexity_after < 0.8 * outcome.perplexity_before
    assert outcome.tokens == 12 * 2 * 32
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows == log.read(tmp_path)
    assert outcome.loss == rows[-1]["loss"] < rows[0]["loss"]
    assert stages[-1] == ("measuring the result", 2, 2)
    assert log.plot(tmp_path).stat().st_size > 1000
    assert any((tmp_path / "tensorboard").iterdir())
    assert outcome.model.config == student.model.config


SETTINGS = {
    "hidden": {"loss": Loss(hidden=1.0, divergence="jsd"), "remat": True},
    "bfloat16": {"dtype": "bfloat16"},
    "cross-entropy": {"loss": Loss(cross_entropy=1.0)},
    "mixed": {"loss": Loss(cross_entropy=0.5, divergence="skewed_kl", temperature=2.0)},
    "written": {"written": Written(sequences=4, tokens=48, prompt=4)},
    "on policy": {"on_policy": OnPolicy(share=1.0, prompt=8)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_runs_and_learns(name, teacher, student, text, tmp_path):
    outcome = run(teacher, student, text, tmp_path, dataclasses.replace(TINY, **SETTINGS[name]))
    assert outcome.perplexity_after < outcome.perplexity_before


@pytest.fixture(scope="module")
def plain(teacher, student, text, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(teacher, student, text, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("settings", [{"accumulate": 2, "batch": 1}, {"remat": True}], ids=str)
def test_how_it_is_computed_changes_nothing(settings, plain, teacher, student, text, tmp_path):
    """Accumulating is a larger batch; remat is the same products once more."""
    other = run(teacher, student, text, tmp_path, dataclasses.replace(TINY, **settings))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(close, weights(plain.model), weights(other.model))


@pytest.mark.parametrize(
    ("mesh", "settings"), [("data=2,tensor=2", {}), ("sequence=2,tensor=2", {"batch": 1, "accumulate": 2})]
)
def test_a_mesh_changes_nothing(teacher, student, text, tmp_path, mesh, settings):
    config, rows = dataclasses.replace(TINY, **settings), {}
    for place in (None, mesh):
        models = []
        for number, (model, tokenizer) in enumerate((teacher, student)):
            jo.save(model, tokenizer, tmp_path / str(number))
            models.append(Model(*jo.load(tmp_path / str(number), mesh=place)))
        rows[place] = []
        run(*models, text, tmp_path / f"{place}.run", config, told=rows[place].append)
    for one, other in zip(*rows.values(), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_numbers_that_are_not_finite_end_it_and_the_last_student_is_kept(teacher, student, text, tmp_path):
    config = dataclasses.replace(TINY, optimizer=Optimizer(learning_rate=1e30, clip=None))
    with pytest.raises(ValueError, match=r"step 2: .* is (nan|inf); the student as it was before is kept in"):
        run(teacher, student, text, tmp_path, config)
    kept, _ = jo.load(tmp_path / "last_good")
    assert all(bool(jnp.isfinite(value).all()) for value in weights(kept).values())
    assert len(log.read(tmp_path)) == 1


def small_vocabulary(student):
    model, tokenizer = student
    params = {
        name: v[:500] if name == "embed.weight" or name.startswith("head") else v
        for name, v in weights(model).items()
    }
    return Model(jo.from_params(dataclasses.replace(model.config, vocab_size=500), params), tokenizer)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, small_vocabulary, "teacher and student have different vocabularies, of 512 and 500 tokens"),
        ({}, lambda student: Model(student.model, None), "the student has no tokenizer"),
        ({"length": 4000}, None, "length=4000 is beyond the teacher's context of 512"),
        ({"length": 512, "batch": 1}, None, None),
        ({"window": 513}, None, "window=513 is longer than the model's context of 512"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, change, message, teacher, student, text, tmp_path):
    config = dataclasses.replace(TINY, **settings)
    train = text[:400]
    learner = change(student) if change else student
    with pytest.raises(
        ValueError, match=message or "a training text has .* tokens, too few for one window of length=512"
    ):
        distill(teacher, learner, config, texts=[train], held_out=text[8000:9000], folder=tmp_path / "run")


def test_between_vocabularies_the_teacher_writes_text(teacher, student, text, tmp_path):
    other = small_vocabulary(student)
    config = dataclasses.replace(
        TINY, loss=Loss(cross_entropy=1.0), written=Written(sequences=4, tokens=48, share=1.0)
    )
    outcome = run(teacher, other, "Once upon a time there was a cat. " * 300, tmp_path, config)
    assert outcome.model.config.vocab_size == 500
    assert len(json.loads((tmp_path / "written.json").read_text())) == 4


def test_another_run_is_not_continued(teacher, student, text, tmp_path):
    run(teacher, student, text, tmp_path)
    with pytest.raises(ValueError, match="holds a run that has not ended; continue it with --resume"):
        run(teacher, student, text, tmp_path)
    other = dataclasses.replace(TINY, optimizer=Optimizer(learning_rate=2e-3))
    message = (
        "holds another run: optimizer.learning_rate was 0.001 and is 0.002; resume with the same settings"
    )
    with pytest.raises(ValueError, match=message):
        run(teacher, student, text, tmp_path, other, resume=True)
    assert run(teacher, student, text, tmp_path, resume=True).tokens == 3 * 2 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 2}, r"mesh sequence=2 splits one window on each data shard: batch=2 must be 1"),
        ({"batch": 1, "length": 33}, r"length=33 a multiple of 2; for larger batches accumulate"),
    ],
)
def test_batches_that_a_sequence_axis_does_not_split(data_dir, text, tmp_path, settings, message):
    model = Model(*jo.load(data_dir / "stories107K.gguf", mesh="sequence=2"))
    with pytest.raises(ValueError, match=message):
        run(model, model, text, tmp_path, dataclasses.replace(TINY, **settings))
