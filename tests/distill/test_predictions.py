"""A teacher that reads before training: what it leaves on disk, and that the steps need no more of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jaxopt_llm as jo
from jaxopt_llm.distill import Distillation, Loss, Model, OnPolicy, distill, finish
from jaxopt_llm.distill.data import Windows
from jaxopt_llm.distill.predictions import PREDICTIONS, Predictions
from jaxopt_llm.models import weights
from tests.distill.conftest import halved
from tests.distill.test_run import TINY

A_TOKEN = 6 * 8 + 4  # bytes


def of_one_window(tokenizer, text, count):
    """Beginnings of lines, each of as many tokens as a window has: there is one place for it, on any grid."""
    found = []
    for line in map(str.strip, text.splitlines()):
        starts = (line[:end] for end in range(TINY.length, len(line)))
        found += [s for s in starts if len(tokenizer.encode(s, add_special=False)) == TINY.length][:1]
        if len(found) == count:
            return found
    raise ValueError("too few lines")


def rows_of(teacher, student, texts, text, folder, config, **settings):
    """What each step measured, but for its time."""
    rows = []
    distill(
        teacher,
        student,
        config,
        texts=texts,
        held_out=text[8000:9000],
        folder=folder,
        told=lambda row: rows.append({name: value for name, value in row.items() if name != "seconds"}),
        **settings,
    )
    return rows


def test_all_of_a_prediction_teaches_what_the_teacher_does_beside_it(teacher, student, text, tmp_path):
    """And with `consume` no array is left of it, but for those that are the student's too."""
    texts = of_one_window(teacher.tokenizer, text, 4)
    beside = rows_of(teacher, student, texts, text, tmp_path / "beside", TINY)
    copied = jax.tree.map(lambda x: jnp.array(x, copy=True), weights(teacher.model))
    own = Model(jo.from_params(teacher.model.config, copied), teacher.tokenizer)
    learner = Model(halved(own.model), own.tokenizer)
    left = []

    def look(stage, done, total):
        if stage == "distilling":
            left.append({name for name, value in weights(own.model).items() if not value.is_deleted()})

    config = dataclasses.replace(TINY, top_k=own.model.config.vocab_size)
    kept = rows_of(own, learner, texts, text, tmp_path / "kept", config, consume=True, progress=look)
    for one, other in zip(beside, kept, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert left[0] == left[-1] == {name for name in weights(own.model) if ".mlp." not in name}
    finish(tmp_path / "kept")
    assert not (tmp_path / "kept" / PREDICTIONS).exists()


def windows_of(teacher, text):
    ids = np.asarray(teacher.tokenizer.encode(text, add_special=False), np.int32)
    return Windows([(ids, 1.0)], batch=4, length=32, seed=1, stride=32)


def kept(folder, model, windows, batches, progress=lambda done, total: None):
    return Predictions(folder, model, windows, batches=batches, batch=2, k=8, progress=progress)


def test_what_is_kept_is_what_the_teacher_predicts(teacher, data_dir, text, tmp_path):
    model, _ = jo.load(data_dir / "stories107K.gguf", mesh="data=2,tensor=2")
    windows = windows_of(teacher, text[:2000])
    predictions = kept(tmp_path, model, windows, batches=2)
    places = next(windows)
    found = predictions[places]
    logits = jax.jit(teacher.model)(windows.tokens(places))
    expected = log_softmax(np.asarray(logits, np.float64), axis=-1)
    np.testing.assert_array_equal(found.ids, np.argsort(-expected, axis=-1)[..., :8])
    np.testing.assert_allclose(found.logprobs, -np.sort(-expected, axis=-1)[..., :8], atol=1e-4)
    rest = np.exp(-np.sort(-expected, axis=-1)[..., 8:]).sum(-1)
    np.testing.assert_allclose(found.tail, np.log(rest), atol=1e-4)


def test_each_window_is_read_once_only_those_taken_and_a_read_goes_on(teacher, text, tmp_path):
    """Of many windows the eight of two batches, in four passes; of three, two and one twice, however many steps."""
    many, few = windows_of(teacher, text[:8000]), windows_of(teacher, text[: text.index(" ", 200)])
    path = tmp_path / PREDICTIONS
    kept(tmp_path, teacher.model, many, batches=2)
    whole = path.read_bytes()
    assert len(whole) == 8 * 32 * A_TOKEN
    path.write_bytes(whole[: 5 * 32 * A_TOKEN + 7])  # killed in the third pass
    begun = []
    kept(tmp_path, teacher.model, many, batches=2, progress=lambda done, total: begun.append((done, total)))
    assert begun == [(2, 4), (3, 4), (4, 4)]
    assert path.read_bytes() == whole
    path.unlink()
    assert len(few.first(20)) == 3
    kept(tmp_path, teacher.model, few, batches=20)
    assert path.stat().st_size == 4 * 32 * A_TOKEN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"on_policy": OnPolicy(prompt=8)}, "and on_policy writes another"),
        ({"loss": Loss(hidden=1.0)}, r"no hidden states; set loss.hidden=0"),
        ({"loss": Loss(divergence="jsd")}, "too few for divergence=jsd; set loss.divergence=forward_kl"),
        ({"loss": Loss(temperature=2.0)}, "at temperature 1; set loss.temperature=1, not 2.0"),
        ({"loss": Loss(cross_entropy=1.0)}, "loss.cross_entropy=1 needs none of them"),
    ],
)
def test_what_predictions_cannot_teach_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**{"top_k": 8, **settings})


def test_more_tokens_than_there_are_is_refused(teacher, student, text, tmp_path):
    config = dataclasses.replace(TINY, top_k=513)
    with pytest.raises(ValueError, match="top_k=513 is more than the 512 tokens of the vocabulary"):
        rows_of(teacher, student, [text[:8000]], text, tmp_path, config)
