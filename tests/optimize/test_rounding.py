"""The step that rounds layer by layer, on a real, tiny model."""

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import weights
from jaxopt_llm.optimize import Calibration, Layerwise, Measure, Recipe, optimize
from jaxopt_llm.quantize import GPTQ, SmoothQuant

STEP = Layerwise(methods=(SmoothQuant(format="int8"),))
RECIPE = Recipe(
    steps=(STEP,),
    measure=Measure(window=64, windows=2, prompt_tokens=8, output_tokens=4, answer_tokens=8),
    calibration=Calibration(sequences=2, length=32),
)
TEXT = "Lily and her mom went to the park. They saw a big dog. The dog was happy and ran to Lily. " * 10


def test_an_interrupted_run_goes_on(data_dir, tmp_path):
    model, tokenizer = jo.load(data_dir / "stories107K.gguf")
    out = tmp_path / "out"
    run = lambda recipe, **more: optimize(model, tokenizer, recipe, calibration=TEXT, out=out, **more)

    def interrupt(stage, done, total):
        if (stage, done) == ("layerwise", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(RECIPE, progress=interrupt)
    assert not out.exists()
    kept = sorted(tmp_path.rglob("layer-*"))
    assert len(kept) == 1
    with pytest.raises(ValueError, match="holds a run with another recipe; give the same to go on"):
        run(Recipe(steps=(Layerwise(methods=(GPTQ(format="int8"),)),), calibration=RECIPE.calibration))
    assert sorted(tmp_path.rglob("layer-*")) == kept
    small = run(RECIPE).model
    matrices = {name for name, value in weights(model).items() if value.ndim == 2}
    assert {name for name, value in weights(small).items() if isinstance(value, QArray)} == matrices
    jax.tree.map(np.testing.assert_array_equal, weights(jo.load(out)[0]), weights(small))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"methods is empty; give at least one, such as GPTQ\(\)"):
        Layerwise(methods=())
    with pytest.raises(ValueError, match="unknown quantization 'int5'"):
        Layerwise(rest="int5")
