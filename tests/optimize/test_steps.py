"""Several steps in one run: each is measured and kept, and an interrupted run goes on after the last of them."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.distill import Distillation, LoRA, Optimizer, Written
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import num_bytes, num_params, weights
from jaxopt_llm.optimize import (
    Calibration,
    Context,
    Distill,
    Measure,
    Mixed,
    Prune,
    Quantize,
    Recipe,
    Sparsify,
    Step,
    optimize,
)
from jaxopt_llm.prune import Shape

MEASURE = Measure(window=64, windows=2, prompt_tokens=8, output_tokens=4, answer_tokens=8)
PRUNE = Prune(shape=Shape(d_ff=32), reconstruct=False)
DISTILL = Distill(
    settings=Distillation(
        steps=8,
        batch=2,
        length=32,
        save_every=2,
        window=64,
        windows=2,
        optimizer=Optimizer(learning_rate=3e-3),
    )
)
RECIPE = Recipe(
    steps=(PRUNE, DISTILL, Quantize(format="int8")),
    measure=MEASURE,
    calibration=Calibration(sequences=2, length=32),
)


@pytest.fixture(autouse=True)
def _promotion():
    """optax takes a float to the power of an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories107K.gguf")


@pytest.fixture(scope="module")
def text(data_dir):
    return (data_dir / "wikitext.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def run(stories, text):
    def run(recipe=RECIPE, **settings):
        given = {"text": text[:1500], "calibration": text[2000:10000]} | settings
        return optimize(*stories, recipe, **given)

    return run


class Killed(Exception):
    pass


def killed_at(*moment):
    """A progress callback that ends the run at a moment."""

    def progress(*at):
        if at == moment:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that nothing interrupts, and where it was saved."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with jax.numpy_dtype_promotion("standard"):
        return run(out=out), out


def test_each_step_is_measured(whole, stories, text):
    outcome, out = whole
    pruned, distilled, rounded = outcome.steps
    assert [step.step for step in outcome.steps] == ["prune", "distill", "quantize"]
    assert distilled.perplexity < pruned.perplexity
    assert distilled.parameters == pruned.parameters < num_params(stories[0])
    assert distilled.bytes == 4 * distilled.parameters
    assert rounded.bytes == num_bytes(outcome.model) < 0.3 * distilled.bytes
    assert all(step.seconds > 0 for step in outcome.steps)
    ids = stories[1].encode(text[:1500], add_special=False)
    found = evaluate.compare(outcome.model, stories[0], ids, window=64, windows=2)
    assert rounded.kld_mean == outcome.after.kld_mean == pytest.approx(found.kld_mean, rel=1e-4)
    assert rounded.perplexity == outcome.after.perplexity == pytest.approx(found.perplexity.perplexity)
    assert rounded.same_top_p == outcome.after.same_top_p == found.same_top_p
    assert outcome.before.perplexity == pytest.approx(found.reference.perplexity)
    assert [path.name for path in out.parent.iterdir()] == ["out"], "what was kept on the way is gone"


@pytest.mark.parametrize(
    ("moment", "finished"),
    [
        (("distilling", 5, 8), 1),
        (("compressing", 2, 3), 2),
        (("timing the original", 1, 4), 3),
    ],
)
def test_an_interrupted_run_ends_where_a_whole_one_does(run, whole, tmp_path, moment, finished):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out=out, progress=killed_at(*moment))
    assert not out.exists()
    stages = []
    outcome = run(out=out, progress=lambda *at: stages.append(at))
    assert ("compressing", finished, 3) == stages[0]
    assert "prune" not in {stage for stage, *_ in stages}
    if moment[0] == "distilling":
        assert next(done for stage, done, _ in stages if stage == "distilling") == 4, "the last snapshot"
    expected, _ = whole
    jax.tree.map(np.testing.assert_array_equal, weights(outcome.model), weights(expected.model))
    figures = lambda found: [dataclasses.replace(step, seconds=0) for step in found.steps]
    assert figures(outcome) == figures(expected)
    assert outcome.before.perplexity == expected.before.perplexity
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_run_is_refused_and_nothing_lost(run, stories, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        run(out=out, progress=killed_at("compressing", 1, 3))
    kept = sorted(path for path in tmp_path.rglob("*"))
    refused = lambda what: pytest.raises(ValueError, match=f"out.run holds a run with another {what}; give")
    with refused("recipe"):
        run(dataclasses.replace(RECIPE, steps=RECIPE.steps[:1]), out=out)
    with refused("text"):
        run(out=out, text=text[:1600])
    with refused("calibration text"):
        run(out=out, calibration=None)
    with refused("model"):
        optimize(
            jo.quantize(stories[0]),
            stories[1],
            RECIPE,
            text=text[:1500],
            calibration=text[2000:10000],
            out=out,
        )
    assert sorted(path for path in tmp_path.rglob("*")) == kept


def test_a_walk_goes_on_layer_by_layer(run, tmp_path):
    recipe, out = dataclasses.replace(RECIPE, steps=(Sparsify(method="wanda"),)), tmp_path / "out"
    with pytest.raises(Killed):
        run(recipe, out=out, progress=killed_at("sparsify", 1, 2))
    assert len(list(tmp_path.rglob("layer-*"))) == 1
    expected = run(recipe)
    outcome = run(recipe, out=out)
    jax.tree.map(np.testing.assert_array_equal, weights(outcome.model), weights(expected.model))


def test_what_others_keep_beside_it_stays(run, tmp_path):
    """`distill` writes its metrics to the same place."""
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "metrics.jsonl").write_text("mine")
    run(dataclasses.replace(RECIPE, steps=(Quantize(),)), out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.run").iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def context(stories, text):
    """Of a step by itself."""
    model, tokenizer = stories
    ids = np.asarray(tokenizer.encode(text[2000:3000], add_special=False)[:32], np.int32)
    return Context(
        original=model,
        tokenizer=tokenizer,
        ids=lambda: ids.reshape(2, 16),
        calibration=None,
        held_out=text[:1500],
        progress=lambda done, total: None,
        stages=lambda stage, done, total: None,
    )


def test_mixed_precision_keeps_its_budget(stories, context, tmp_path):
    file = tmp_path / "sensitivities.json"
    step = Mixed(target_bits=7.0, formats=("int4_g32_zero", "int8"), sensitivities=file)
    small = step(stories[0], context)
    bits = {value.bits for value in weights(small).values() if isinstance(value, QArray)}
    assert bits == {4, 8}
    assert 8 * num_bytes(small) <= 7.0 * num_params(small)
    assert file.exists()


def test_what_the_original_writes_is_text_enough_and_adapters_are_merged(stories, context):
    settings = dataclasses.replace(
        DISTILL.settings, lora=LoRA(rank=2), steps=2, written=Written(sequences=2, tokens=40)
    )
    healed = Distill(settings=settings)(stories[0], context)
    changed = {
        name
        for name, value in weights(healed).items()
        if not np.array_equal(value, weights(stories[0])[name])
    }
    assert changed == {name for name in weights(healed) if ".attention." in name or ".mlp." in name}


def test_there_must_be_a_text_to_distil_on(run, tmp_path):
    with pytest.raises(ValueError, match="there is no text to distil on"):
        run(dataclasses.replace(RECIPE, steps=(DISTILL,)), calibration=None, out=tmp_path / "out")
    assert not any(tmp_path.iterdir()), "nothing was begun"


def test_without_the_extra_a_recipe_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs grain: pip install 'jaxopt-llm\[train\]'"):
        Distill()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 0.0}, r"target_bits=0\.0 must be above 0"),
        ({"formats": ()}, "formats is empty"),
        ({"sequences": 0}, "sequences=0 must be at least 1"),
        ({"formats": ("int5",)}, "unknown quantization 'int5'"),
    ],
)
def test_settings_of_mixed_precision_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixed(**settings)


def test_they_are_steps():
    assert isinstance(Mixed(), Step)
    assert isinstance(DISTILL, Step)
