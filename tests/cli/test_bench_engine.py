"""`bench engine`: medians with their spread, and how many programs that took."""

import json

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
