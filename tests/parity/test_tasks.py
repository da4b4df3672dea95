"""Tasks of lm-evaluation-harness: our engine against the harness's own Hugging Face models, live."""

import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from tests import harness_tasks

pytestmark = pytest.mark.parity


@pytest.mark.filterwarnings("ignore")  # the harness's and transformers' own
def test_figures_are_those_of_the_harness_s_own_models(data_dir, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxopt_llm.evaluate.tasks import run_tasks

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model, tokenizer = jo.load(data_dir / "stories260K.gguf")
    folder = harness_tasks.write(tmp_path, ("Lily", "see what was inside", "no", "no", "no"))
    checkpoints.export_hf(model, tokenizer, tmp_path / "model")
    names = list(harness_tasks.TASKS)
    ours = run_tasks(model, tokenizer, names, include_path=folder)
    theirs = simple_evaluate(
        HFLM(pretrained=str(tmp_path / "model"), dtype="float32", device="cpu", max_length=511),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=1000,
        log_samples=False,
    )["results"]
    for task, result in ours.items():
        for name, metric in result.metrics.items():
            key, _, chosen = name.partition(",")
            chosen = chosen or "none"
            assert metric.value == pytest.approx(theirs[task][f"{key},{chosen}"], rel=1e-5), (task, name)
            if metric.stderr is not None:
                stderr = theirs[task][f"{key}_stderr,{chosen}"]
                assert metric.stderr == pytest.approx(stderr, rel=1e-4), (task, name)
    assert 0 < ours["tiny_writing"].metrics["exact_match,bare"].value < 1
