"""`bench engine`: medians with their spread, and how many programs that took."""

import json

import pytest

ARGUMENTS = ("--prompt_tokens=40", "--output_tokens=6", "--concurrency=2", "--repeats=2")


def test_figures(run_cli, storyteller):
    done = run_cli("bench", "engine", f"--model={storyteller}", "--json", *ARGUMENTS)
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    spread = report.pop("spread")
    assert report.pop("programs") == 2, "80 tokens of prompts in a step of 128, and 2 rows that decode"
    assert report.keys() == spread.keys()
    for name, (low, high) in spread.items():
        assert 0 < low <= report[name] <= high, name
    assert "| programs" in run_cli("bench", "engine", f"--model={storyteller}", *ARGUMENTS).stdout


def test_the_stages_of_a_pipeline(run_cli, data_dir, tmp_path):
    picture = tmp_path / "schedule.svg"
    options = ["--prompt_tokens=16", "--output_tokens=24", "--concurrency=4", "--repeats=1", "--json"]
    model = f"--model={data_dir / 'stories107K.gguf'}"
    done = run_cli("bench", "engine", model, "--mesh=stage=2", f"--schedule={picture}", *options)
    assert done.code == 0, done.stderr
    busy = json.loads(done.stdout)["busy"]
    assert len(busy) == 2 and all(0 <= share <= 1 for share in busy)
    assert "stage 1" in picture.read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule=a.svg"], "--schedule draws the stages of a pipeline; add --mesh=stage=2, or drop it"),
        (["--schedule=a.jpg", "--mesh=stage=2"], "--schedule=a.jpg must end in .svg or .png"),
    ],
)
def test_schedules_that_cannot_be(run_cli, data_dir, flags, message):
    done = run_cli("bench", "engine", f"--model={data_dir / 'stories107K.gguf'}", *flags)
    assert done.code == 2 and message in done.stderr
