"""The script that measures the decode step: it runs here, on a tiny shape."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.step", "--shape=tiny", "--nosave", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_of_weights(dtype):
    done = run("--quantize=none,int8,int4", "--batch=1,3", "--context=20", "--steps=2", f"--dtype={dtype}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(one["quantize"], one["batch"]) for one in found["runs"]] == [
        (format, batch) for format in ("none", "int8", "int4") for batch in (1, 3)
    ]
    for one in found["runs"]:
        assert one["tokens_per_s"] == pytest.approx(one["batch"] * 1e3 / one["ms_per_step"])
        assert one["mbu"] > 0 and one["mfu"] > 0


def test_what_it_does_not_know():
    done = run("--quantize=int5")
    assert done.returncode == 1
    assert "unknown form of weights" in done.stderr
