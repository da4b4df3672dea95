"""Configs: found by name or path, overridden field by field, every mistake named."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm import configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    format: Literal["int8", "int8_block"] = "int8"
    group: int | None = None
    bits: Literal[4, 8] = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str = "plain"
    rate: float = 0.5
    keep: bool = False
    sizes: tuple[int, ...] = (1, 2)
    span: tuple[int, float] = (1, 0.5)
    folder: Path | None = None
    either: str | int = "a"
    step: Step = Step()
    steps: tuple[Step, ...] = (Step(), Step(bits=4))

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must not be negative")


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("name=none", Recipe(name="none")),
        ("name=a=b", Recipe(name="a=b")),
        ("name=", Recipe(name="")),
        ("rate=1e-3", Recipe(rate=0.001)),
        ("rate=2", Recipe(rate=2.0)),
        ("keep=True", Recipe(keep=True)),
        ("sizes=3,4,5", Recipe(sizes=(3, 4, 5))),
        ("sizes=(7,)", Recipe(sizes=(7,))),
        ("sizes=", Recipe(sizes=())),
        ("sizes.1=9", Recipe(sizes=(1, 9))),
        ("span=3,0.25", Recipe(span=(3, 0.25))),
        ("span.1=2", Recipe(span=(1, 2.0))),
        ("folder=a/b", Recipe(folder=Path("a/b"))),
        ("folder=none", Recipe(folder=None)),
        ("either=3", Recipe(either=3)),
        ("either=b", Recipe(either="b")),
        ("step.group=64", Recipe(step=Step(group=64))),
        ("step.bits=4", Recipe(step=Step(bits=4))),
        ("steps.1.format=int8_block", Recipe(steps=(Step(), Step(bits=4, format="int8_block")))),
    ],
)
def test_override(assignment, expected):
    assert configs.override(Recipe(), assignment) == expected


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rate", "'rate' must be written field=value"),
        ("rat=1", "Recipe has no field 'rat' (did you mean rate?); it has name, rate,"),
        ("step.grup=1", "Step has no field 'grup' (did you mean group?)"),
        ("rate.x=1", "0.5 has no fields"),
        ("rate=fast", "'fast' is not float"),
        ("keep=1", "'1' is not bool"),
        ("sizes=1,x", "'x' is not int"),
        ("sizes.2=1", "'2' must be an index below 2"),
        ("sizes.-1=1", "'-1' must be an index below 2"),
        ("span=1", "'1' is not tuple[int, float]"),
        ("step.group=1.5", "'1.5' is not int or none"),
        ("step.bits=2", "'2' is not 4 or 8"),
        ("step.format=int4", "'int4' is not int8 or int8_block"),
        ("step=int8", "'int8' is not a Step, which is set a field at a time (format, group, bits)"),
        ("rate=-1", "rate=-1.0 must not be negative"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError) as caught:
        configs.override(Recipe(), assignment)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"override {assignment}") or "=" not in assignment
    assert "\n" not in str(caught.value)


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.integers()))
def test_what_python_prints_is_read_back(group, rate, keep, sizes):
    recipe = Recipe()
    for assignment in (f"step.group={group}", f"rate={abs(rate)}", f"keep={keep}", f"sizes={tuple(sizes)}"):
        recipe = configs.override(recipe, assignment)
    assert recipe == Recipe(step=Step(group=group), rate=abs(rate), keep=keep, sizes=tuple(sizes))


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


PRELUDE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Mine:
    a: "int" = 1
    b: "str" = "x"

"""


def test_load_a_file_of_ones_own(file):
    path = file(PRELUDE + "def config():\n    return Mine(a=2)\n")
    assert dataclasses.asdict(configs.load(path)) == {"a": 2, "b": "x"}
    assert dataclasses.asdict(configs.load(path, ["a=3", "b=y", "a=4"])) == {"a": 4, "b": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\n", "defines no config()"),
        ("def config(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        (PRELUDE + "def config():\n    return Mine(c=1)\n", "TypeError"),
        ("def config():\n    return {'a': 1}\n", "must return a frozen dataclass, not dict"),
        (
            PRELUDE.replace("frozen=True", "") + "def config():\n    return Mine()\n",
            "frozen dataclass, not Mine",
        ),
    ],
)
def test_load_refuses(file, text, message):
    with pytest.raises(ValueError) as caught:
        configs.load(file(text))
    assert message in str(caught.value)
    assert "mine.py" in str(caught.value)


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config file"):
        configs.load(str(tmp_path / "none.py"))
    with pytest.raises(ValueError, match=r"no config 'int8x'.*known: "):
        configs.load("int8x")


@pytest.mark.parametrize("name", configs.names())
def test_packaged_configs_load_and_say_how_to_run_them(name):
    config = configs.load(name)
    assert dataclasses.is_dataclass(config)
    assert configs.load(name) == config
    [path] = configs.FOLDER.glob(f"*/{name}.py")  # one file a name, over all kinds
    assert f"--config={name}" in path.read_text()


def test_names_are_of_a_kind():
    assert set(configs.names("recipes")) <= set(configs.names())
    assert configs.names("no_such_kind") == []


def test_the_loader_needs_no_jax():
    code = "import sys, jaxopt_llm.configs; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
