"""`jaxopt-llm distill`: what it prints and writes, what it refuses, and that a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.distill import log
from jaxopt_llm.distill.predictions import PREDICTIONS
from jaxopt_llm.models import weights
from tests.distill.conftest import halved

SMALL = [f"--set={s}" for s in ("batch=2", "length=32", "window=64", "windows=2", "save_every=2", "steps=6")]
WRITTEN = ["--set=written.sequences=4", "--set=written.tokens=48"]


@pytest.fixture(autouse=True)
def _promotion():
    """optax takes a float to the power of an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def common(data_dir, tmp_path_factory):
    """Flags that all runs share."""
    folder = tmp_path_factory.mktemp("distill")
    source = data_dir / "stories107K.gguf"
    model, tokenizer = jo.load(source)
    jo.save(halved(model), tokenizer, folder / "student")
    text = (data_dir / "wikitext.txt").read_text("utf-8")
    (folder / "train.txt").write_text(text[:8000])
    (folder / "held.txt").write_text(text[8000:9000])
    return [
        "--config=distill",
        f"--teacher={source}",
        f"--student={folder / 'student'}",
        f"--text={folder / 'held.txt'}",
        f"--train={folder / 'train.txt'}",
        *SMALL,
        *WRITTEN,
    ]


def test_a_student_is_distilled(run_cli, common, tmp_path):
    done = run_cli("distill", *common, f"--out={tmp_path / 'out'}", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {
        "loss",
        "tokens",
        "perplexity_before",
        "perplexity_after",
        "teacher_perplexity",
        "out",
    } <= found.keys()
    assert found["tokens"] == 6 * 2 * 32
    assert found["teacher_perplexity"] < found["perplexity_after"] < found["perplexity_before"]
    assert len(log.read(tmp_path / "out.run")) == 6
    assert (tmp_path / "out.run" / "loss.png").exists()
    left = {path.name for path in (tmp_path / "out.run").iterdir()}
    assert left == {"metrics.jsonl", "tensorboard", "loss.png"}, (
        "what another run would take for its own is gone"
    )
    model, tokenizer = jo.load(tmp_path / "out")
    assert jo.generate(model, tokenizer, "Once", max_tokens=4)[0].token_ids
    assert "cross-entropy" in done.stderr


def test_a_killed_run_goes_on_bit_by_bit(run_cli, common, tmp_path):
    flags = [*common, "--set=optimizer.ema=0.5", "--set=steps=30"]
    flags += ["--set=written.prompt=4", "--set=top_k=8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_cli.subprocess("distill", *flags, f"--out={whole}").code == 0
    command = [sys.executable, "-m", "jaxopt_llm", "distill", *flags, f"--out={cut}"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    folder = tmp_path / "cut.run"
    while len(log.read(folder)) < 5 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not cut.exists()
    assert (folder / PREDICTIONS).exists()
    done = log.read(folder)
    assert 5 <= len(done) < 30, "killed on the way"
    refused = run_cli("distill", *flags, f"--out={cut}")
    assert refused.code == 2
    assert "continue it with --resume" in refused.stderr
    other = run_cli("distill", *flags, f"--out={cut}", "--resume", "--set=optimizer.learning_rate=1e-3")
    assert other.code == 2
    assert "optimizer.learning_rate was 0.0003 and is 0.001" in other.stderr
    resumed = run_cli.subprocess("distill", *flags, f"--out={cut}", "--resume")
    assert resumed.code == 0, resumed.stderr
    assert not (folder / PREDICTIONS).exists()
    strip = lambda folder: [{k: v for k, v in row.items() if k != "seconds"} for row in log.read(folder)]
    assert strip(folder) == strip(tmp_path / "whole.run")
    one, other = (weights(jo.load(place)[0]) for place in (whole, cut))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set=length=400", "--set=written=none", "--train=SHORT"], "too few for one window of length=400"),
        (["--set=written=none", "--train=nowhere.txt"], "No such file"),
        (["--set=optimizer.learning_rate=1e30", "--set=optimizer.clip=none"], "step 2: "),
        (["--train=HELD"], "--text is for measuring alone"),
        (["--set=loss.divergence=kl"], "is not forward_kl"),
    ],
)
def test_a_mistake_is_one_line(run_cli, common, tmp_path, flags, message):
    (tmp_path / "short.txt").write_text("A few words.")
    held = next(flag for flag in common if flag.startswith("--text="))
    given = [
        flag.replace("SHORT", str(tmp_path / "short.txt")).replace("HELD", held.removeprefix("--text="))
        for flag in flags
    ]
    done = run_cli("distill", *common, *given, f"--out={tmp_path / 'out'}")
    assert done.code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("jaxopt-llm: error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_kind_is_refused_before_anything_is_read(run_cli, tmp_path):
    done = run_cli(
        "distill", "--config=int8", "--teacher=none", "--student=none", f"--out={tmp_path / 'out'}"
    )
    assert done.code == 2
    assert "--config=int8 is a Recipe; distill takes a Distillation" in done.stderr
