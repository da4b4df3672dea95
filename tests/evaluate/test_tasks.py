"""Tasks of lm-evaluation-harness on a tiny model: its figures against what the documents' own log-likelihoods give."""

import functools
import math
import re

import pytest

import jaxopt_llm as jo
from jaxopt_llm.evaluate import tasks
from tests import harness_tasks


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def folder(stories, tmp_path_factory):
    """Three of five answers are what the model writes."""
    model, tokenizer = stories
    written = []
    for start, *_ in harness_tasks.STORIES[:3]:
        head = tokenizer.encode(start)
        ids = head + harness_tasks.greedy(model, head, 24)
        text = tokenizer.to_bytes(ids).removeprefix(tokenizer.to_bytes(head)).decode()
        written.append(re.split(r"[.\n]", text)[0].strip())
    return harness_tasks.write(tmp_path_factory.mktemp("tasks"), (*written, "no", "no"))


@pytest.fixture(scope="module")
def found(stories, folder):
    return tasks.run_tasks(*stories, list(harness_tasks.TASKS), include_path=folder)


def log_likelihood(stories, start, end):
    model, tokenizer = stories
    ids, head = tokenizer.encode(f"{start} {end}"), tokenizer.encode(start)
    return harness_tasks.score(model, head, ids[len(head) :])


def test_choices_and_words(stories, found):
    values = {
        (start, end): log_likelihood(stories, start, end)
        for start, ends, _ in harness_tasks.STORIES
        for end in ends
    }
    right, right_norm, words, greedy = [], [], [], []
    for start, ends, label in harness_tasks.STORIES:
        scores = [values[start, end][0] for end in ends]
        right.append(max(range(3), key=lambda i: scores[i]) == label)
        right_norm.append(max(range(3), key=lambda i: scores[i] / len(ends[i])) == label)
        words.append(scores[label])
        greedy.append(values[start, ends[label]][1])
    choice, word = found["tiny_choice"], found["tiny_words"]
    assert choice.metrics["acc"].value == pytest.approx(sum(right) / 5)
    assert choice.metrics["acc_norm"].value == pytest.approx(sum(right_norm) / 5)
    assert 0 < choice.metrics["acc"].value < 1
    assert (choice.documents, choice.shots, choice.metrics["acc"].higher_is_better) == (5, 0, True)
    assert word.metrics["acc"].value == pytest.approx(sum(greedy) / 5)
    assert word.metrics["perplexity"].value == pytest.approx(math.exp(-sum(words) / 5), rel=1e-4)
    assert word.metrics["perplexity"].stderr > 0
    assert word.metrics["perplexity"].higher_is_better is False


def test_whole_texts_and_writing(stories, found):
    texts = [f"{start} {ends[label]}" for start, ends, label in harness_tasks.STORIES]
    model, tokenizer = stories
    nats = -sum(harness_tasks.score(model, [tokenizer.bos_id], tokenizer.encode(t))[0] for t in texts)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["tiny_rolling"].metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-4)
    assert found["tiny_rolling"].metrics["bits_per_byte"].stderr is None
    assert found["tiny_writing"].metrics["exact_match,bare"].value == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["tiny_choice", "tinny"], {}, "no task is called 'tinny'"),
        ([], {}, "no task is named"),
        (["tiny_choice"], {"limit": 0}, "limit=0 must be at least 1"),
        (["tiny_choice"], {"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        (["tiny_choice"], {"include_path": "nowhere"}, "include_path=nowhere is no directory"),
    ],
)
def test_mistakes(stories, folder, names, settings, message, monkeypatch):
    """None is among the harness's own tasks either, which take a while to read."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match=message):
        tasks.run_tasks(*stories, names, **{"include_path": folder, **settings})
