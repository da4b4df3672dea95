"""The main job on a real, tiny model."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.checkpoints import export_hf
from jaxopt_llm.models import num_bytes, weights
from jaxopt_llm.optimize import Measure, Quantize, Recipe, optimize, sample_text

MEASURE = Measure(window=64, windows=2, prompt_tokens=8, output_tokens=4, answer_tokens=8)
RECIPE = Recipe(steps=(Quantize(format="int8"),), measure=MEASURE)


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories107K.gguf")


@pytest.fixture(scope="module")
def text(data_dir):
    return (data_dir / "wikitext.txt").read_text("utf-8")[:2000]


@pytest.fixture(scope="module")
def run(stories, text, data_dir, tmp_path_factory):
    """The outcome, where it was saved, and the stages it went through."""
    out, stages = tmp_path_factory.mktemp("optimize") / "a" / "out", []
    source = data_dir / "stories107K.gguf"
    report = lambda *stage: stages.append(stage)
    outcome = optimize(*stories, RECIPE, text=text, source=source, out=out, progress=report)
    return outcome, out, stages


def test_reports_say_what_the_models_are(run, stories, data_dir):
    outcome, out, _ = run
    small = jo.quantize(stories[0], "int8")
    before, after = outcome.before, outcome.after
    assert before.parameters == after.parameters == 106_816
    assert before.file_bytes == (data_dir / "stories107K.gguf").stat().st_size
    assert after.file_bytes == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert before.bytes == 4 * 106_816
    assert after.bytes == num_bytes(small)


def test_reports_say_how_good_the_models_are(run, stories, text):
    outcome, *_ = run
    model, tokenizer = stories
    ids = tokenizer.encode(text, add_special=False)
    expected = evaluate.compare(jo.quantize(model, "int8"), model, ids, window=64, windows=2)
    before, after = outcome.before, outcome.after
    assert before.perplexity == pytest.approx(expected.reference.perplexity, rel=1e-6)
    assert (before.kld_mean, before.same_top_p) == (0.0, 1.0)
    assert after.perplexity == pytest.approx(expected.perplexity.perplexity, rel=1e-6)
    assert after.kld_mean == pytest.approx(expected.kld_mean, rel=1e-4)
    assert after.same_top_p == expected.same_top_p
    assert min(before.prefill_tokens_per_s, before.decode_tokens_per_s) > 0
    assert min(after.prefill_tokens_per_s, after.decode_tokens_per_s) > 0


def test_what_is_saved_is_what_was_measured(run):
    outcome, out, _ = run
    restored, tokenizer = jo.load(out)
    jax.tree.map(np.testing.assert_array_equal, weights(restored), weights(outcome.model))
    assert jo.generate(restored, tokenizer, MEASURE.question, max_tokens=8)[0].text == outcome.sample


def test_progress_ends_every_stage(run):
    ends = {stage: (done, total) for stage, done, total in run[2]}
    assert ends == {
        "compressing": (1, 1),
        "comparing on text": (2, 2),
        "timing the original": (4, 4),
        "timing the result": (4, 4),
        "answering": (1, 1),
    }


def test_chat_models_are_asked_as_such(data_dir, text):
    model, tokenizer = jo.load(data_dir / "stories107K.gguf")
    tokenizer.chat_templates["default"] = "Once upon a time{{ messages[0].content[:0] }}"
    outcome = optimize(model, tokenizer, RECIPE, text=text)
    expected = jo.generate(outcome.model, tokenizer, "Once upon a time", max_tokens=8)
    assert outcome.sample == expected[0].text
    assert outcome.before.file_bytes is None, "nothing was said of a file"
    assert outcome.after.file_bytes is None, "nothing was saved"


def test_a_checkpoint_is_optimised_in_its_place(run, stories, text, tmp_path):
    model, tokenizer = stories
    place = tmp_path / "model"
    jo.save(model, tokenizer, place)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    outcome = optimize(model, tokenizer, RECIPE, text=text, source=place, out=place)
    assert outcome.before.file_bytes == size
    assert outcome.after.file_bytes < size / 2


def test_of_a_hugging_face_directory_the_safetensors_count(stories, text, tmp_path):
    model, tokenizer = stories
    export_hf(model, tokenizer, tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("x" * 100_000)
    outcome = optimize(model, tokenizer, RECIPE, text=text, source=tmp_path / "hf")
    assert outcome.before.file_bytes == (tmp_path / "hf" / "model.safetensors").stat().st_size


def test_the_text_that_ships_is_long_enough(stories):
    text = sample_text()
    assert len(text.encode()) == 47_560
    assert text.startswith(" = Valkyria Chronicles III = \n")
    assert text.endswith("\n")
    default = Measure()
    assert len(text) > 8 * default.window * default.windows, (
        "eight characters a token is more than any tokenizer"
    )


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({}, "", "the text has 0 tokens"),
        ({"window": 513}, "Once upon a time", "window=513 is longer than the model's context of 512"),
        ({"prompt_tokens": 510}, "Once upon a time", "more than the model's context of 512"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(stories, tmp_path, settings, text, message):
    measure, stages = dataclasses.replace(MEASURE, **settings), []
    recipe, progress = dataclasses.replace(RECIPE, measure=measure), lambda *stage: stages.append(stage)
    with pytest.raises(ValueError, match=message):
        optimize(*stories, recipe, text=text, out=tmp_path / "out", progress=progress)
    assert not any(tmp_path.iterdir())
    assert not stages, "before any work"


def test_a_model_without_tokenizer_is_refused(stories):
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        optimize(stories[0], None, RECIPE)
