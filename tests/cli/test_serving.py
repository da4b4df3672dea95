"""Serving configs: `size --write` makes one, the commands that run a model read it, flags beside it win."""

import ast
import io
import json
import sys

import pytest

from jaxopt_llm import configs
from jaxopt_llm.engine import EngineConfig, ServingConfig

ASKED = ("--input_tokens=40", "--output_tokens=6", "--concurrency=2", "--requests=4")
FILE = """
from jaxopt_llm.engine import EngineConfig, ServingConfig


def config() -> ServingConfig:
    return ServingConfig(model={model!r}, engine=EngineConfig(max_slots=2, max_seq_len=64, cache_tokens=128))
"""


@pytest.fixture
def mine(tmp_path, shallow):
    """A config of the little model, in a file."""
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(model=str(shallow)))
    return path


def test_size_writes_what_bench_engine_runs(run_cli, data_dir, tmp_path):
    model, path = str(data_dir / "stories107K.gguf"), tmp_path / "deep" / "mine.py"
    asked = (f"--model={model}", "--chip=v5e", "--topology=1x1", *ASKED)
    done = run_cli("size", *asked, f"--write={path}")
    assert done.code == 0, done.stderr
    assert f"written to {path}" in done.stdout
    assert [each.name for each in path.parent.iterdir()] == ["mine.py"]
    assert configs.load(str(path)) == ServingConfig(
        model=model, engine=EngineConfig(max_slots=2, max_seq_len=128, cache_tokens=256)
    )
    text = path.read_text()
    told = " ".join(ast.get_docstring(ast.parse(text)).replace("\\\n", "").split())
    assert f"jaxopt-llm bench engine --config={path} --prompt_tokens=40 --output_tokens=6" in told
    assert f"jaxopt-llm size --model={model} --chip=v5e" in told
    assert "40 tokens and 6 of output on average, 2 at once" in told
    assert "$" in told
    lengths = ("--prompt_tokens=40", "--output_tokens=6", "--repeats=1", "--json")
    done = run_cli("bench", "engine", f"--config={path}", *lengths)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["decode_tokens_per_s"] > 0
    again = run_cli("size", *asked, f"--write={path}")
    assert again.code == 2
    assert "stands there already" in again.stderr
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write=mine.txt"], "--write=mine.txt must end in .py"),
        (["--write="], "--write is empty"),
        (
            ["--write=mine.py", "--chip=v5e", "--topology=1x1", "--input_tokens=400000"],
            "more than the model's context",
        ),
    ],
)
def test_what_is_not_written(run_cli, data_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run_cli("size", f"--model={data_dir / 'stories107K.gguf'}", *arguments)
    assert done.code == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_config_names_the_model_and_a_flag_wins(run_cli, mine, shallow):
    prompt = ("--prompt=Once", "--max_tokens=4", "--json")
    own = run_cli("generate", f"--model={shallow}", *prompt)
    for more in (
        [],
        [f"--model={shallow}", "--set=model=nowhere"],
        ["--set=engine.max_slots=1", "--prompt_lookup"],
    ):
        done = run_cli("generate", f"--config={mine}", *prompt, *more)
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["token_ids"] == json.loads(own.stdout)["token_ids"]
    done = run_cli("generate", f"--config={mine}", *prompt, "--set=model=nowhere")
    assert (done.code, "nowhere" in done.stderr) == (2, True)


def test_chat_keeps_to_the_length_of_the_config(run_cli, mine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two three four five six seven eight nine ten\n" * 3))
    done = run_cli("chat", f"--config={mine}", "--max_tokens=16")
    assert done.code == 0, done.stderr
    assert "outgrew 64 tokens of context" in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", ["--config=int8", "--prompt=x"], "--config=int8 is a Recipe; commands that run a model take"),
        ("generate", ["--set=engine.max_slots=2", "--prompt=x"], "has no config to change; name one with --config"),
        ("generate", ["--config={mine}", "--prompt=x", "--set=mesh=tensor=16"], "mesh tensor=16 needs 16 devices"),
        ("generate", ["--config={mine}", "--prompt=x", "--set=mesh=sequence=2"], "and splits no sequence=2"),
        ("generate", ["--config={mine}", "--prompt=" + "a b " * 60], "the context is 64; shorten it"),
        ("bench engine", ["--config={mine}", "--concurrency=3"], "3 sequences at once are more than the 2 of"),
        ("bench engine", ["--config={mine}", "--prompt_tokens=60", "--output_tokens=8"], "68 tokens of a prompt"),
        (
            "bench engine",
            ["--config={mine}", "--prompt_tokens=40", "--output_tokens=6", "--set=engine.cache_tokens=64"],
            "92 tokens of all sequences are more than the 64 of",
        ),
        (
            "bench engine",
            ["--config={mine}", "--prompt_tokens=40", "--output_tokens=6", "--append=runs.json", "--set=mesh=tensor=2"],
            "--append takes no --mesh yet",
        ),
        (
            "bench engine",
            [
                "--config={mine}", "--prompt_tokens=40", "--output_tokens=6", "--append=runs.json",
                "--set=engine.max_tokens_per_step=64",
            ],
            "--append takes no engine.max_tokens_per_step=64",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(run_cli, mine, command, arguments, message):
    done = run_cli(*command.split(), *(argument.format(mine=mine) for argument in arguments))
    assert done.code == 2
    assert message in done.stderr.splitlines()[-1]


def test_a_model_has_a_name():
    with pytest.raises(ValueError, match="model is empty"):
        ServingConfig(model="")
