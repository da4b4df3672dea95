"""The part of `eval` that runs tasks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxopt_llm.cli import show
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer

if TYPE_CHECKING:
    from jaxopt_llm.evaluate.tasks import TaskResult


RunTasks = Callable[[Transformer, Tokenizer], "dict[str, TaskResult]"]


def prepare_tasks(names: Sequence[str], options: Mapping[str, Any]) -> RunTasks:
    """What runs these tasks on a model, if there are any.

    Raises:
      ValueError: for options without tasks, or tasks without the harness.
    """
    if not names:
        given = [name for name, value in options.items() if value is not False]
        if given:
            raise ValueError(f"--{given[0]} is for tasks; give --tasks too")
        return lambda model, tokenizer: {}
    try:
        from jaxopt_llm.evaluate.tasks import run_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError("--tasks needs lm-evaluation-harness; pip install 'jaxopt-llm[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells each default that it takes

    def run(model: Transformer, tokenizer: Tokenizer) -> "dict[str, TaskResult]":
        with stages("requests") as report:
            return run_tasks(model, tokenizer, names, **options, consume=True, progress=report)

    return run


def tell_tasks(results: "Mapping[str, TaskResult]") -> None:
    """Prints a table, a metric a row."""
    rows = [
        (task, name, metric.value, metric.stderr, result.documents, result.shots)
        for task, result in results.items()
        for name, metric in result.metrics.items()
    ]
    show.table(("task", "metric", "value", "stderr", "documents", "shots"), rows, right=range(2, 6))
