"""Recipes: what they hold is checked when they are made."""

import dataclasses

import pytest

from jaxopt_llm import configs
from jaxopt_llm.optimize import Measure, Quantize, Recipe, Step


def test_packaged_recipes():
    assert {"int8", "int8_block"} <= set(configs.names("recipes"))
    for name in configs.names("recipes"):
        assert isinstance(configs.load(name), Recipe)
    assert configs.load("int8") == Recipe(steps=(Quantize(format="int8"),))
    assert configs.load("int8_block") == Recipe(steps=(Quantize(format="int8_block"),))


def test_settings_are_reached_from_the_command_line():
    recipe = configs.load("int8", ["steps.0.format=int8_block", "measure.windows=2"])
    assert recipe == Recipe(steps=(Quantize(format="int8_block"),), measure=Measure(windows=2))


def test_steps_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class Nothing:
        def __call__(self, model, context):
            return model

    assert isinstance(Nothing(), Step)
    assert Recipe(steps=(Nothing(), Quantize())).steps[1].format == "int8"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(steps=()), "a recipe needs at least one step"),
        (lambda: Quantize(format="int7"), "unknown quantization 'int7'"),
        (lambda: Measure(window=1), "window=1 must be at least 2"),
        (lambda: Measure(windows=0), "windows=0 must be at least 1"),
        (lambda: Measure(prompt_tokens=0), "prompt_tokens=0 must be at least 1"),
        (lambda: Measure(output_tokens=1), "output_tokens=1 must be at least 2"),
        (lambda: Measure(question=""), "question is empty"),
        (lambda: Measure(answer_tokens=0), "answer_tokens=0 must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
