"""The launch scripts of `configs/launch/`, run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import jaxopt_llm as jo
from jaxopt_llm.cli import main

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


FAKES = {  # what the scripts call, on no cluster
    "gcloud": 'for word; do case "$word" in --command=*) bash -c "${word#--command=}";; esac; done',
    "srun": 'shift; exec "$@"',
    "jaxopt-llm": 'printf "%s\\n" "$@"',
}


def asked(name: str, tmp_path: Path) -> list[str]:
    """The words of the one call of ours in a launch file."""
    path = SCRIPT.parent / name
    if name.endswith(".yaml"):
        (job,) = yaml.safe_load(path.read_text("utf-8"))["spec"]["replicatedJobs"]
        pods = job["template"]["spec"]
        (container,) = pods["template"]["spec"]["containers"]
        assert pods["parallelism"] == pods["completions"]
        chips = pods["completions"] * container["resources"]["limits"]["google.com/tpu"]
        assert f"--mesh=tensor={chips}" in container["command"]
        return container["command"][1:]
    for fake, body in FAKES.items():
        (tmp_path / fake).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / fake).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TPU": "slice",
        "ZONE": "z",
        "MODEL": "hf:org/name",
        "SLURM_NTASKS": "16",
    }
    done = subprocess.run(["bash", path], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch", "gke_jobset.yaml"])
def test_files_for_many_hosts(name, tmp_path):
    """They parse, and use flags that there are."""
    command, *words = asked(name, tmp_path)
    values = main._flags(main._command(command))
    assert main._parse(command, values, words) == []
    given = {name: values[name].value for name in ("coordinator", "mesh", "model", "prompt")}
    expected = {"coordinator": "auto", "mesh": "tensor=16", "model": "hf:org/name"}
    assert given == expected | {"prompt": "Why is the sky blue?"}
