"""The launch scripts of `configs/launch/`, run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

import jaxopt_llm as jo

SCRIPT = Path(__file__).parents[2] / "configs" / "launch" / "finetune_eval.py"


def run(*flags):
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=300)


def test_finetune_eval_on_a_mesh(data_dir, tmp_path):
    done = run(
        f"--model={data_dir / 'stories260K.gguf'}",
        f"--text={data_dir / 'wikitext.txt'}",
        f"--out={tmp_path / 'tuned'}",
        "--mesh=data=2,tensor=2",
        "--steps=3",
        "--length=64",
        "--learning_rate=1e-3",
    )
    assert done.returncode == 0, done.stderr
    *steps, summary = done.stdout.splitlines()
    assert [line.split(":")[0] for line in steps] == ["step 1", "step 2", "step 3"]
    before, after = summary.removeprefix("held-out perplexity ").split(" -> ")
    assert float(after) < 0.7 * float(before)
    model, tokenizer = jo.load(tmp_path / "tuned")
    assert model.config.vocab_size == tokenizer.vocab_size == 512


def test_a_mistake_in_a_flag_is_absls():
    done = run("--stepz=3")
    assert done.returncode == 1
    assert "Unknown command line flag 'stepz'. Did you mean: steps" in done.stderr
