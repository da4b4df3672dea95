"""`eval`: figures as the library gives them, and every mistake told."""

import json
import shutil
import sys

import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from tests import families, harness_tasks


@pytest.fixture(scope="module")
def text(data_dir, tmp_path_factory):
    """A file with line ends that Python would translate."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"Once upon a time,\r\nthere was a girl. " * 20)
    return path


@pytest.fixture
def score(run_cli, storyteller, text):
    def run(*arguments):
        return run_cli("eval", f"--model={storyteller}", f"--text={text}", "--window=32", *arguments)

    return run


def figures(done):
    assert done.code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def expected_ids(tokenizer, text):
    return tokenizer.encode(text.read_bytes().decode(), add_special=False)


def test_perplexity(score, storyteller, text):
    model, tokenizer = jo.load(storyteller)
    ids = expected_ids(tokenizer, text)
    expected = evaluate.perplexity(model, ids, window=32, windows=4, tokenizer=tokenizer)
    found = figures(score("--windows=4", "--json"))
    assert found.pop("perplexity_interval") == pytest.approx(expected.interval)
    assert found.pop("bits_per_byte_interval") == pytest.approx(expected.bits_per_byte_interval)
    assert found == pytest.approx(
        {
            "perplexity": expected.perplexity,
            "perplexity_stderr": expected.stderr,
            "bits_per_byte": expected.bits_per_byte,
            "tokens": 4 * 31,
        }
    )


def test_every_flag_counts(score, storyteller, text):
    model, tokenizer = jo.load(storyteller)
    found = figures(score("--windows=2", "--stride=16", "--bos", "--json"))
    ids = expected_ids(tokenizer, text)
    expected = evaluate.perplexity(model, ids, window=32, stride=16, windows=2, bos=tokenizer.bos_id)
    assert found["tokens"] == 31 + 16
    assert found["perplexity"] == pytest.approx(expected.perplexity)


def test_reference(score, storyteller, text):
    model, tokenizer = jo.load(storyteller)
    ids = expected_ids(tokenizer, text)
    expected = evaluate.compare(jo.quantize(model, "int8"), model, ids, window=32, windows=2)
    found = figures(score("--quantize=int8", f"--reference={storyteller}", "--windows=2", "--json"))
    assert found["kld_mean"] == pytest.approx(
        expected.kld_mean, rel=0.01
    )  # rounded while read, or afterwards
    assert found["kld_stderr"] == pytest.approx(expected.kld_stderr, rel=0.05)
    assert found["same_top_p"] == pytest.approx(expected.same_top_p, abs=0.04)
    assert found["reference_perplexity"] == pytest.approx(expected.reference.perplexity)
    assert found["perplexity"] == pytest.approx(expected.perplexity.perplexity, rel=1e-3)


def test_for_people(score):
    done = score("--windows=1")
    assert done.code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "perplexity",
        "perplexity_stderr",
        "perplexity_interval",
        "bits_per_byte",
        "bits_per_byte_interval",
        "tokens",
    ]
    assert "scoring" in done.stderr


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride=33"], "stride=33 must be at least 1 and at most window=32"),
        (["--stride=0"], "stride=0 must be at least 1"),
        (["--windows=0"], "windows=0 must be at least 1"),
        (["--window=1"], "window=1 must be at least 2"),
        (["--window=513"], "window=513 is longer than the model's context of 512; try window=512"),
        (["--reference=nowhere"], "nowhere: no such model"),
        (["--text=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text=."], ".: Is a directory"),
        (["--text="], "Is a directory"),
    ],
)
def test_mistakes(score, arguments, message):
    assert_refused(score(*arguments), message)


def assert_refused(done, message):
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("jaxopt-llm: error: ")
    assert message in done.stderr.splitlines()[-1]


def test_mistakes_are_found_before_the_model_is_loaded(run_cli):
    """The default model would have to be downloaded."""
    assert_refused(run_cli("eval"), "eval needs --text, a UTF-8 file to score, or --tasks")
    assert_refused(
        run_cli("eval", "--limit=3", "--text=nowhere.txt"), "--limit is for tasks; give --tasks too"
    )
    assert_refused(run_cli("eval", "--tasks=piqa", "--reference=a"), "--reference is compared with on a text")
    assert_refused(run_cli("eval", "--text=nowhere.txt"), "nowhere.txt")
    assert_refused(run_cli("eval", "--text=nowhere.txt", "--window=8", "--stride=9"), "stride=9")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the text has 0 tokens; at least 2"),
        ("é".encode("latin-1") * 9, "byte 0 is not UTF-8 text"),
    ],
)
def test_texts_that_cannot_be_scored(score, tmp_path, data, message):
    assert_refused(score(f"--text={write(tmp_path / 'text', data)}"), message)


def test_a_model_without_tokenizer(run_cli, storyteller, text, tmp_path):
    jo.save(jo.load(storyteller)[0], None, tmp_path / "bare")
    assert_refused(run_cli("eval", f"--model={tmp_path / 'bare'}", f"--text={text}"), "has no tokenizer")


def test_a_reference_of_another_vocabulary(score, tmp_path):
    families.write("llama", tmp_path / "other")
    message = "a vocabulary of 512 tokens and the reference one of 101"
    assert_refused(score(f"--reference={tmp_path / 'other'}"), message)


def test_a_reference_of_another_tokenizer(score, storyteller, tmp_path):
    """Of the same size: two of its tokens have changed places."""
    other = tmp_path / "other"
    shutil.copytree(storyteller, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁a"], vocabulary["▁he"] = vocabulary["▁he"], vocabulary["▁a"]
    file.write_text(json.dumps(tokenizer), "utf-8")
    message = f"--reference={other} reads the text as other tokens than --model={storyteller}"
    assert_refused(score(f"--reference={other}"), message)


def test_a_reference_without_tokenizer(score, storyteller, tmp_path):
    jo.save(jo.load(storyteller)[0], None, tmp_path / "bare")
    assert figures(score(f"--reference={tmp_path / 'bare'}", "--windows=1", "--json"))["kld_mean"] == 0


def test_tasks(run_cli, storyteller, text, tmp_path):
    """Own ones; the figures are those that `evaluate.tasks` gives."""
    folder = harness_tasks.write(tmp_path)
    common = (
        "eval",
        f"--model={storyteller}",
        "--tasks=tiny_choice",
        f"--include_path={folder}",
        "--limit=2",
    )
    found = figures(run_cli(*common, f"--text={text}", "--window=32", "--windows=2", "--json"))
    assert found["perplexity"] > 1
    task = found["tasks"]["tiny_choice"]
    assert (task["documents"], task["shots"]) == (2, 0)
    assert {"acc", "acc_norm"} == set(task["metrics"])
    assert 0 <= task["metrics"]["acc"]["value"] <= 1
    shown = run_cli(*common)
    assert shown.stdout.splitlines()[2].split()[1:4:2] == ["tiny_choice", "acc"]
    assert_refused(run_cli(*common[:-1], "--limit=0"), "limit=0 must be at least 1")


def test_tasks_without_the_harness(run_cli, monkeypatch):
    for name in ("jaxopt_llm.evaluate.tasks", "jaxopt_llm.evaluate.harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = "--tasks needs lm-evaluation-harness; pip install 'jaxopt-llm[eval]'"
    assert_refused(run_cli("eval", "--tasks=piqa"), message)
