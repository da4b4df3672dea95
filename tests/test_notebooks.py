"""The notebooks run top to bottom; their first cell installs what a machine lacks and leaves its JAX alone."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("quickstart", "research", "compress", "scale")
TIMEOUT = 300  # seconds a cell, on a machine that does much else

OLD_TPU = {"jax": "0.7.2", "jaxlib": "0.7.2", "libtpu": "0.0.20"}
NEW_TPU = {"jax": "0.12.0.dev20260801", "jaxlib": "0.12.0.dev20260801", "libtpu": "0.0.45"}
OLD_GPU = {"jax": "0.9.1", "jaxlib": "0.9.1", "jax-cuda12-plugin": "0.9.1", "jax-cuda12-pjrt": "0.9.1"}


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell["id"]: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module", params=NOTEBOOKS)
def executed(request, data_dir, tmp_path_factory):
    """A notebook that has run on the tiny model, and its name."""
    notebook = read(request.param)
    folder = str(tmp_path_factory.mktemp(request.param))
    # groups of 64 divide all widths of the second one
    model = "stories107K.gguf" if request.param == "compress" else "stories260K.gguf"
    environment = {
        **os.environ,
        "JAXOPT_NOTEBOOK_MODEL": str(data_dir / model),
        "JAXOPT_NOTEBOOK_STEPS": "8",
        "TMPDIR": folder,  # what it writes goes away with the test's own files
    }
    resources = {"metadata": {"path": folder}}
    nbclient.NotebookClient(notebook, timeout=TIMEOUT, resources=resources).execute(env=environment)
    return request.param, notebook


def text(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def has_picture(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def test_runs_top_to_bottom(executed):
    name, notebook = executed
    ran = cells(notebook)
    assert all(cell.execution_count for cell in ran.values())
    assert [key for key, cell in ran.items() if "plot" in key and not has_picture(cell)] == []
    checks = {
        "quickstart": check_quickstart,
        "research": check_research,
        "compress": check_compress,
        "scale": check_scale,
    }
    checks[name](ran)


def check_quickstart(ran):
    assert "groups of 32 do not divide" in text(ran["quantize"])  # this model's feed-forward width is 172
    table = [line.split() for line in text(ran["evaluate"]).splitlines()[1:]]
    (_, size, perplexity, *_), (_, smaller, after, kld, same_top) = table
    assert float(smaller) < 0.3 * float(size)
    assert float(after) == pytest.approx(float(perplexity), rel=0.01)
    assert 0 < float(kld) < 0.01
    assert float(same_top.rstrip("%")) > 90
    assert "Once upon a time >>, there was a little girl named Lily." in text(ran["generate"])
    assert "base model" in text(ran["chat"])


def check_research(ran):
    lines = text(ran["gradient"]).splitlines()
    assert ["penguin" in line for line in lines[:2]] == [False, True]  # the vector has learnt it
    assert float(text(ran["frozen"]).split()[-1]) > 0.9
    difference = re.search(r"on 8 devices differ from those on one by (\S+)", text(ran["mesh"]))
    assert float(difference[1]) < 1e-3


def check_compress(ran):
    for *_, cut, fitted in map(str.split, text(ran["prune"]).splitlines()[1:]):
        assert float(fitted) < 0.95 * float(cut)
    before, after = map(float, re.search(r"perplexity (\S+) -> (\S+)", text(ran["distil"])).groups())
    assert after < 0.9 * before
    kld = {line.split()[0]: float(line.split()[3]) for line in text(ran["quantize"]).splitlines()}
    assert max(kld["AWQ"], kld["GPTQ"]) < kld["RTN"]
    first, *_, small, rival = (re.split(r"\s{2,}", line) for line in text(ran["final"]).splitlines()[1:6])
    assert [first[0], small[0], rival[0]] == [
        "original",
        f"small: int4 {min(kld, key=kld.get)}",
        "unpruned: int3 GPTQ",
    ]
    assert float(small[1]) < 0.2 * float(first[1])
    assert len(text(ran["save"]).splitlines()) == 2


def check_scale(ran):
    rows = [re.split(r"\s{2,}", line) for line in text(ran["shard"]).splitlines()[1:]]
    shapes = {name: (shape, shard) for name, _, shape, _, shard in rows}
    assert shapes["layers.0.mlp.gate.weight"] == ("(172, 64)", "(43, 64)")
    assert shapes["final_norm.weight"] == ("(64,)", "(64,)")
    assert "CPU 0,4" in str(ran["look"].outputs)
    difference = re.search(r"on 8 devices differ from those on one by (\S+)", text(ran["same"]))
    assert float(difference[1]) < 1e-3
    assert "all-reduce" in text(ran["same"])
    best = [line.split() for line in text(ran["size"]).splitlines()[1:]]
    assert [chip for chip, *_ in best] == ["v5e", "v5p", "v6e", "tpu7x", "h100", "h200"]
    chips = {chip: int(count) for chip, count, *_ in best}
    assert chips["v5e"] * 16.9e9 > 70.6e9, "weights in int8 alone"
    assert max(float(milliseconds) for _, _, _, _, milliseconds, *_ in best) <= 50
    assert f"max_slots={32 // data_shards(best[0][2])}" in text(ran["write"])


def data_shards(mesh: str) -> int:
    found = re.search(r"data=(\d+)", mesh)
    return int(found[1]) if found else 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_clean(name):
    notebook = read(name)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in cells(notebook).values())


def install_cell() -> str:
    sources = {cells(read(name))["install"].source for name in NOTEBOOKS}
    assert len(sources) == 1, "every notebook installs alike"
    return sources.pop()


@pytest.fixture
def pip(monkeypatch):
    """The arguments of every `pip install` that a cell would run."""
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    return calls


def run_install(monkeypatch, found: dict[str, str]) -> dict:
    """Runs the cell where the package is missing and these versions are there."""
    packages = [SimpleNamespace(name=name, version=version) for name, version in found.items()]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(metadata, "distributions", lambda: packages)
    namespace: dict = {}
    exec(install_cell(), namespace)
    return namespace


def test_nothing_is_installed_where_the_package_is(pip):
    exec(install_cell(), {})
    assert pip == []


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (
            NEW_TPU | {"numpy": "2.3"},
            ["[notebooks]", *(f"{n}=={v}" for n, v in NEW_TPU.items())],
            "Keeping jax",
        ),
        (OLD_TPU, ["[notebooks,tpu]"], "Upgrading jax 0.7.2, jaxlib 0.7.2, libtpu 0.0.20"),
        (OLD_GPU, ["[notebooks,cuda12]"], "Upgrading jax 0.9.1"),
        ({"numpy": "2.3"}, ["[notebooks]"], "no JAX here"),
    ],
    ids=["new", "old TPU", "old GPU", "none"],
)
@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "by name"])
def test_jax_stays_or_goes_up_whole(monkeypatch, tmp_path, capsys, pip, checkout, found, wanted, said):
    monkeypatch.chdir(ROOT / "notebooks" if checkout else tmp_path)
    run_install(monkeypatch, found)
    source = str(ROOT) if checkout else "jaxopt-llm"
    first, *rest = wanted
    assert pip == [[sys.executable, "-m", "pip", "install", "--quiet", source + first, *rest]]
    assert said in capsys.readouterr().out


def test_the_cell_and_the_package_ask_for_the_same_jax(monkeypatch, pip):
    namespace = run_install(monkeypatch, {})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [jax] = [r for r in map(Requirement, project["dependencies"]) if r.name == "jax"]
    assert str(jax.specifier) == f">={namespace['OLDEST_JAX']}"
    assert {"notebooks", *namespace["EXTRAS"].values()} <= set(project["optional-dependencies"])
