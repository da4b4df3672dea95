"""Shared flags: a program has those it names and no others."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from jaxopt_llm.cli import flags as shared
from jaxopt_llm.cli import main

LAUNCH_SCRIPT = """
from absl import app, flags
from jaxopt_llm.cli import flags as jo_flags

STEPS = flags.DEFINE_integer("steps", 1, "Steps of training.")
jo_flags.use(jo_flags.MODEL, jo_flags.SET)

def main(argv):
    print(jo_flags.MODEL.value, jo_flags.SET.value, STEPS.value)

app.run(main)
"""


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH_SCRIPT)
    return lambda *arguments: subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True
    )


def test_importing_them_defines_nothing_of_absl():
    assert "model" not in flags.FLAGS
    assert "model" in shared.SHARED


def test_absl_programs_use_them_beside_their_own(launch):
    assert launch("--model=m", "--set=a=1", "--set=b=2", "--steps=3").stdout == "m ['a=1', 'b=2'] 3\n"
    assert launch().stdout == f"{shared.MODEL.default} [] 1\n"


def test_absl_programs_refuse_those_they_do_not_use(launch):
    done = launch("--dtype=float32")
    assert done.returncode == 1
    assert "dtype" in done.stderr


def test_absl_programs_show_them_in_their_help(launch):
    assert "--model" in launch("--help").stdout


def test_a_group_gives_what_was_set():
    shared.SHARED["top_k"].parse("40")
    shared.SHARED.mark_as_parsed()
    try:
        assert shared.SAMPLING.value == {"top_k": 40}
    finally:
        shared.SHARED["top_k"].unparse()


MODULES = {path.stem: path for path in Path(main.__file__).parent.glob("[!_]*.py") if path.stem != "flags"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_commands_read_every_flag_they_accept(name):
    module = importlib.import_module(f"jaxopt_llm.cli.{name}")
    held = {
        name for name, value in vars(module).items() if isinstance(value, flags.FlagHolder | shared.FlagGroup)
    }
    nodes = ast.walk(ast.parse(MODULES[name].read_text()))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert held <= read


@pytest.mark.parametrize("name", ["generate", "chat", "evaluate", "optimize", "convert", "bench_engine"])
def test_whatever_loads_a_model_takes_an_adapter(name):
    flags = main._flags(importlib.import_module(f"jaxopt_llm.cli.{name}"))
    assert {"model", "dtype", "adapter"} <= set(flags)
