"""Perplexity of a model on a text, how far its predictions lie from another model's, and what it reaches on tasks.

A --text is read in windows, without a BOS. Intervals, of 95 % confidence, come from how much the windows differ.
--tasks are those of lm-evaluation-harness, or one's own in --include_path; they need the extra `eval`.
"""

import functools
from collections.abc import Sequence

from absl import flags

from jaxopt_llm import evaluate
from jaxopt_llm.cli import show
from jaxopt_llm.cli.evaluate_tasks import RunTasks, prepare_tasks, tell_tasks
from jaxopt_llm.cli.flags import (
    BOS,
    DTYPE,
    HOSTS,
    JSON,
    LOADING,
    MESH,
    MODEL,
    REFERENCE,
    TEXT,
    WINDOW,
    WINDOWS,
    FlagGroup,
)
from jaxopt_llm.cli.hosts import together
from jaxopt_llm.cli.loading import load_whole
from jaxopt_llm.cli.measuring import read_text, stages
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer

STRIDE = flags.DEFINE_integer("stride", None, "Tokens from a window to the next. Unset: no overlap.")
TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-evaluation-harness to run, such as arc_easy,piqa.")
TASK_OPTIONS = FlagGroup(
    (
        flags.DEFINE_string("include_path", None, "Directory of one's own tasks, as YAML files."),
        flags.DEFINE_integer(
            "num_fewshot", None, "Examples before each document. Unset: the task's own number."
        ),
        flags.DEFINE_integer("limit", None, "Ask only the first so many documents of each task."),
        flags.DEFINE_boolean(
            "apply_chat_template", False, "Put the tasks' questions as a chat model is asked."
        ),
    )
)


def main(argv: Sequence[str]) -> None:
    if TEXT.value is None and not TASKS.value:
        raise ValueError("eval needs --text, a UTF-8 file to score, or --tasks")
    if REFERENCE.value and TEXT.value is None:
        raise ValueError("--reference is compared with on a text; give --text too")
    if TASKS.value and HOSTS.value:
        raise ValueError("--tasks run in one process; leave out --coordinator, or give --text instead")
    evaluate.check_sizes(window=WINDOW.value, stride=STRIDE.value, windows=WINDOWS.value)
    run_tasks = prepare_tasks(TASKS.value, TASK_OPTIONS.value)
    text = None if TEXT.value is None else read_text(TEXT.value)
    with together(HOSTS.value, MESH.value):
        run(text, run_tasks)


def run(text: str | None, run_tasks: RunTasks) -> None:
    """Loads the model, and prints what is found of it."""
    model, tokenizer = load_whole(MODEL.value, splits=_splits(), **LOADING.value)
    if tokenizer is None:
        raise ValueError(f"{MODEL.value} has no tokenizer, and text cannot be scored without one")
    figures = {} if text is None else _score(model, tokenizer, text)
    results = run_tasks(model, tokenizer)
    if JSON.value:
        show.json_line(figures | ({"tasks": results} if results else {}))
        return
    if figures:
        show.fields(figures)
    if results:
        tell_tasks(results)


def _score(model: Transformer, tokenizer: Tokenizer, text: str) -> dict[str, object]:
    reference = _load_reference(REFERENCE.value, tokenizer, text) if REFERENCE.value else None
    return measure(model, reference, tokenizer, text)


def _load_reference(source: str, tokenizer: Tokenizer, text: str) -> Transformer:
    """The model to compare with, which must read the text as the same tokens."""
    reference, own = load_whole(source, splits=_splits(), dtype=DTYPE.value, mesh=MESH.value)
    if own is not None and own.encode(text, add_special=False) != tokenizer.encode(text, add_special=False):
        raise ValueError(
            f"--reference={source} reads the text as other tokens than --model={MODEL.value}; "
            "only models of one tokenizer can be compared token by token"
        )
    return reference


def measure(
    model: Transformer, reference: Transformer | None, tokenizer: Tokenizer, text: str
) -> dict[str, object]:
    """Everything the command prints, by name."""
    if BOS.value and tokenizer.bos_id is None:
        raise ValueError("--bos: the model's tokenizer has no BOS token; drop the flag")
    ids = tokenizer.encode(text, add_special=False)
    with stages("windows") as report:
        options: evaluate.Reading = {
            "window": WINDOW.value,
            "stride": STRIDE.value,
            "windows": WINDOWS.value,
            "bos": tokenizer.bos_id if BOS.value else None,
            "tokenizer": tokenizer,
            "progress": functools.partial(report, "scoring"),
        }
        if reference is None:
            return _own(evaluate.perplexity(model, ids, **options))
        found = evaluate.compare(model, reference, ids, **options)
    return _own(found.perplexity) | {
        "kld_mean": found.kld_mean,
        "kld_stderr": found.kld_stderr,
        "kld_interval": found.kld_interval,
        "same_top_p": found.same_top_p,
        "same_top_interval": found.same_top_interval,
        "reference_perplexity": found.reference.perplexity,
    }


def _own(found: evaluate.Perplexity) -> dict[str, object]:
    return {
        "perplexity": found.perplexity,
        "perplexity_stderr": found.stderr,
        "perplexity_interval": found.interval,
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_interval": found.bits_per_byte_interval,
        "tokens": found.tokens,
    }


def _splits() -> tuple[str, ...]:
    """Mesh axes: tasks go through the engine, which splits no sequence."""
    return ("expert", "tensor") if TASKS.value else ("expert", "sequence", "tensor")
