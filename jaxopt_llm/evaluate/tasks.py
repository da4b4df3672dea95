"""Tasks of lm-evaluation-harness: multiple choice, perplexity and generation, on any model.

It needs the extra `eval`; the rest of `evaluate` does not.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from jaxopt_llm.engine import Engine, EngineConfig
from jaxopt_llm.evaluate.harness import EngineLM, Progress
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer

_SLOTS = 16
_CONTEXT = 4096  # tokens: more than any task takes that a small model can do
_RESAMPLES = 1000  # for the errors of metrics that are no means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a task.

    Attributes:
      value, stderr: the figure and its standard error; None where the harness knows none.
      higher_is_better: None where it does not say.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model reaches on a task, or on a group of them.

    Attributes:
      metrics: by name, such as `acc_norm`; one after a filter is called `exact_match,strict-match`.
      documents: how many were asked; None for a group.
      shots: examples before each.
    """

    metrics: dict[str, Metric]
    documents: int | None
    shots: int | None


def run_tasks(
    model: Transformer,
    tokenizer: Tokenizer | None,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    consume: bool = False,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Runs tasks by name, and tells what each gave.

    Args:
      model: any model.
      tokenizer: of its text.
      tasks: names of the harness's tasks, groups and tags, or of those in `include_path`; patterns (`mmlu_*`) too.
      include_path: a directory of one's own tasks: YAML files, of which `dataset_path: json` reads local data.
      num_fewshot: examples before each document; None for the task's own number.
      limit: only the first so many documents of each task.
      apply_chat_template: ask as a chat model is asked.
      consume: the model's arrays are deleted once they are packed for the kernels, as `Engine` has it.
      progress: called with (stage, requests done, of all).

    Raises:
      ValueError: for a model without a tokenizer, a task that is not there, or settings that the engine lacks.
      OSError: if a task's data cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"{num_fewshot=} must be at least 0")
    manager, names = _find(tasks, include_path)
    context = min(_CONTEXT, model.config.max_seq_len)
    engine = Engine(model, tokenizer, EngineConfig(max_slots=_SLOTS, max_seq_len=context), consume=consume)
    with _on_this_process():
        found = simple_evaluate(
            EngineLM(engine, progress=progress),
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=_RESAMPLES,
            log_samples=False,
        )
    return {name: _result(name, found) for name in found["results"]}


def _find(tasks: Sequence[str], include_path: str | Path | None) -> tuple[TaskManager, list[str]]:
    if not tasks:
        raise ValueError("no task is named; give at least one")
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(
                f"include_path={include_path} is no directory; give one that holds YAML files of tasks"
            )
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):  # reading the harness's own thousands takes a while
            return own, list(tasks)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    missing = [task for task in tasks if not manager.match_tasks([task])]
    if missing:
        raise ValueError(
            f"no task is called {' or '.join(map(repr, missing))}; see `lm-eval ls tasks` for names, or give "
            "include_path, a directory of one's own"
        )
    return manager, manager.match_tasks(list(tasks))


@contextlib.contextmanager
def _on_this_process() -> Iterator[None]:
    """The harness resamples in forks, which JAX's threads do not survive, and prints where only results belong."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    values = found["results"][name]
    better = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen == "none" else key] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, float) else None,  # or "N/A"
            higher_is_better=better.get(metric),
        )
    counts = found.get("n-samples", {}).get(name)
    return TaskResult(
        metrics=metrics,
        documents=counts and counts["effective"],
        shots=found.get("n-shot", {}).get(name),
    )
