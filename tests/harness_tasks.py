"""Tiny tasks for lm-evaluation-harness, one of each kind of request, and what a plain forward says of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxopt_llm.models import Transformer

_LENGTH = 128  # of every forward here, so that it compiles once

STORIES = [
    ("Once upon a time, there was a little girl named", ["Lily", "stone", "running away"], 0),
    ("Tom was sad. He wanted to", ["the", "play with his toy", "seven"], 1),
    ("The dog ran to the park and", ["a", "of the of", "saw a big ball"], 2),
    ("One day, Lily and her mom went to the", ["park", "went", "said to"], 0),
    ("Her mom said,", ['"Yes, you can', "yes of to", "park the"], 0),
]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
TASKS = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: ends
doc_to_target: label
fewshot_split: test
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "tiny_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}} {{ends[label]}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "tiny_words": """output_type: loglikelihood
doc_to_text: "{{start}}"
doc_to_target: " {{ends[label]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
""",
    "tiny_writing": """output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{written}}"
generation_kwargs:
  until: [".", "\\n"]
  max_gen_toks: 24
filter_list:
  - name: bare
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
""",
}


def write(folder: Path, written: tuple[str, ...] = ("",) * len(STORIES)) -> Path:
    """A directory of tasks; `written` are the answers that `tiny_writing` takes for right."""
    rows = [
        {"start": start, "ends": ends, "label": label, "written": answer}
        for (start, ends, label), answer in zip(STORIES, written, strict=True)
    ]
    data = folder / "stories.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, settings in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{COMMON.format(data=data)}{settings}", "utf-8")
    return folder


def log_probs(model: Transformer, ids: Sequence[int]) -> Float[np.ndarray, "n V"]:
    """Of the token after each, float64."""
    padded = np.zeros((1, _LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(model(jnp.asarray(padded)), np.float64)[0, : len(ids)]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def score(model: Transformer, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of the continuation, and whether each of its tokens is the likeliest."""
    rows = log_probs(model, [*context, *continuation])[len(context) - 1 : -1]
    found = rows[np.arange(len(continuation)), list(continuation)]
    return float(found.sum()), bool((rows.argmax(-1) == list(continuation)).all())


def greedy(model: Transformer, context: Sequence[int], tokens: int) -> list[int]:
    """The likeliest tokens after a context, one after another."""
    ids = list(context)
    for _ in range(tokens):
        ids.append(int(log_probs(model, ids)[-1].argmax()))
    return ids[len(context) :]
