"""`report`: several models in a table, as JSON and as a page, and every mistake told."""

import json

import pytest

import jaxopt_llm as jo
from tests import families

SMALL = ("--window=32", "--windows=3", "--nospeed")


@pytest.fixture(scope="module")
def sources(storyteller, data_dir, tmp_path_factory):
    """A GGUF file, a Hugging Face directory and a checkpoint of ours."""
    model, tokenizer = jo.load(storyteller)
    ours = tmp_path_factory.mktemp("ours") / "int8"
    jo.save(jo.quantize(model, "int8"), tokenizer, ours)
    return [data_dir / "stories260K.gguf", storyteller, ours]


@pytest.fixture(scope="module")
def report(run_cli, sources, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "page.html"
    text = f"--text={data_dir / 'wikitext.txt'}"
    return run_cli("report", *sources, f"--out={out}", text, *SMALL, "--json"), out


def test_models_are_compared_with_the_first(report, sources):
    done, out = report
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    first, same, small = found["models"]
    assert found["out"] == str(out)
    assert [row["name"] for row in found["models"]] == ["stories260K.gguf", "model", "int8"]
    assert first["kld_mean"] is None and first["file_bytes"] == sources[0].stat().st_size
    assert same["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert same["kld_mean"] == pytest.approx(0, abs=1e-6)
    assert same["same_top_p"] == 1
    assert 1e-6 < small["kld_mean"] < 0.1
    assert small["kld_interval"][0] <= small["kld_mean"] <= small["kld_interval"][1]
    assert 0.8 < small["same_top_p"] < 1
    assert len(small["layer_errors"]) == 5
    assert len(found["kld_histogram_edges"]) == len(small["kld_histogram"]) + 1
    assert small["bytes"] < first["bytes"] / 2


def test_the_page_holds_them(report):
    page = report[1].read_text("utf-8")
    assert page.count("<tr>") == 1 + 3
    assert page.count("<figure>") == 4
    assert "On the first 3 windows of 32 tokens of wikitext.txt; the reference is stories260K.gguf" in page


def test_another_reference_and_names_that_meet(run_cli, sources, tmp_path):
    """On the text that ships with the package, as a table."""
    reference = f"--reference={sources[0]}"
    done = run_cli("report", sources[2], sources[2], reference, f"--out={tmp_path / 'p.html'}", *SMALL)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "KL divergence" in lines[0]
    assert lines[2].split(" | ")[0].strip("| ") == str(sources[2])
    assert lines[-1] == f"saved to {tmp_path / 'p.html'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report needs models to compare"),
        (["nowhere"], "nowhere: no such model"),
        (["nowhere", "--window=1"], "window=1 must be at least 2"),
        (["nowhere", "--text=nothing.txt"], "nothing.txt: No such file or directory"),
        (["nowhere", "--out=."], ".: a directory stands where a file is to be written"),
    ],
)
def test_mistakes(run_cli, tmp_path, arguments, message):
    done = run_cli("report", f"--out={tmp_path / 'page.html'}", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]


def test_a_wrong_name_is_told_before_anything_is_loaded(run_cli, sources, tmp_path):
    done = run_cli("report", sources[0], "nowhere", f"--out={tmp_path / 'page.html'}")
    assert done.stderr.startswith("jaxopt-llm: error: nowhere: no such model")


def test_a_model_without_tokenizer(run_cli, tmp_path):
    families.write("llama", tmp_path / "bare")
    done = run_cli("report", tmp_path / "bare", f"--out={tmp_path / 'page.html'}", *SMALL)
    assert done.code == 2
    assert "has no tokenizer, and text cannot be scored" in done.stderr.splitlines()[-1]


def test_without_matplotlib(run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run_cli("report", "nowhere", f"--out={tmp_path / 'page.html'}")
    assert "a page with plots needs matplotlib; pip install" in done.stderr.splitlines()[-1]
