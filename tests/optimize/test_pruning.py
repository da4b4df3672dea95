"""Recipes that prune: the parts that matter most stay, and what the report says of zeros."""

import pytest

import jaxopt_llm as jo
from jaxopt_llm import configs
from jaxopt_llm.models import num_params, weights
from jaxopt_llm.optimize import Calibration, Measure, Prune, Quantize, Recipe, Sparsify, optimize
from jaxopt_llm.prune import Shape, body_params

MEASURE = Measure(window=64, windows=2, prompt_tokens=8, output_tokens=4, answer_tokens=8)
CALIBRATION = Calibration(sequences=2, length=32)


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories107K.gguf")


@pytest.fixture(scope="module")
def text(data_dir):
    return (data_dir / "wikitext.txt").read_text("utf-8")


def run(stories, text, *steps, **settings):
    recipe = Recipe(steps=steps, measure=MEASURE, calibration=CALIBRATION)
    return optimize(*stories, recipe, text=text[:2000], **settings)


def test_a_pruned_model_is_dense_smaller_and_saved(stories, text, tmp_path):
    seen = []
    scores = tmp_path / "scores.safetensors"
    steps = (Prune(target_params=0.7, importance=scores), Quantize(format="int8"))
    outcome = run(
        stories,
        text,
        *steps,
        calibration=text[2000:],
        out=tmp_path / "out",
        progress=lambda *at: seen.append(at),
    )
    assert scores.exists()
    assert outcome.after.parameters == num_params(outcome.model) < outcome.before.parameters
    assert 0.65 < body_params(outcome.model) / body_params(stories[0]) <= 0.7
    assert outcome.after.zeros < 0.01
    assert ("prune", 2, 2) in seen, "the step tells how far it is"
    assert jo.load(tmp_path / "out")[0].config == outcome.model.config


def test_another_size_needs_no_new_pass(stories, text, tmp_path, monkeypatch):
    """Scores are read from their file; a model without them would be sampled, which is not allowed here."""
    scores = tmp_path / "scores.safetensors"
    shape = Shape(d_ff=96)
    run(stories, text, Prune(shape=shape, importance=scores, reconstruct=False), calibration=text[2000:])
    monkeypatch.setattr(
        "jaxopt_llm.optimize.steps.calibration_ids", lambda *_, **__: pytest.fail("a new pass")
    )
    outcome = run(stories, text, Prune(shape=Shape(num_layers=1), importance=scores, reconstruct=False))
    assert outcome.model.config.num_layers == 1


def test_zeros_are_reported_and_bring_nothing(stories, text):
    outcome = run(stories, text, Sparsify(method="magnitude", sparsity="2:4"))
    layers = sum(
        v.size for name, v in weights(stories[0]).items() if name.startswith("layers") and v.ndim == 2
    )
    assert outcome.after.zeros == pytest.approx(layers / 2 / outcome.after.parameters, abs=0.01)
    assert outcome.before.zeros < 0.01
    assert outcome.after.bytes == outcome.before.bytes


def test_without_a_text_the_model_is_sampled(stories, text):
    outcome = run(stories, text, Sparsify(method="wanda", sparsity=0.5))
    assert outcome.after.zeros > 0.3


@pytest.mark.parametrize("name", ["prune70", "magnitude50", "wanda50", "sparsegpt50", "sparsegpt24"])
def test_packaged_recipes(name):
    assert isinstance(configs.load(name), Recipe)


def test_settings_are_reached_from_the_command_line():
    recipe = configs.load("sparsegpt50", ["steps.0.sparsity=2:4", "calibration.length=64"])
    assert recipe.steps == (Sparsify(method="sparsegpt", sparsity="2:4"),)
    assert recipe.calibration == Calibration(length=64)
    assert configs.load("prune70", ["steps.0.target_params=0.5"]).steps == (Prune(target_params=0.5),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(), "give one of them, and one alone"),
        (lambda: Prune(target_params=0.7, shape=Shape(d_ff=8)), "give one of them, and one alone"),
        (lambda: Prune(target_params=1.0), r"target_params=1\.0 must lie between 0 and 1"),
        (lambda: Prune(target_params=0.7, multiple=0), "multiple=0 must be at least 1"),
        (lambda: Sparsify(sparsity="4:2"), "sparsity='4:2' must keep"),
        (lambda: Sparsify(sparsity=1.0), r"sparsity='1\.0' must be a share between 0 and 1"),
        (lambda: Calibration(length=2), "length=2 at least 3"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (slice(0, 2000), "cannot be calibrated on the text that it is measured on"),
        (slice(0, 40), "is too short|need"),
    ],
)
def test_an_unfit_calibration_text_is_refused(stories, text, calibration, message):
    with pytest.raises(ValueError, match=message):
        run(stories, text, Sparsify(method="wanda"), calibration=text[calibration])
