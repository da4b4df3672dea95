"""`size`: which chips serve a model."""

import dataclasses
import json
import os

import jax
import pytest

from jaxopt_llm import checkpoints
from jaxopt_llm import size as sizing
from jaxopt_llm.sharding.chips import CHIPS
from tests import families

ASKED = ("--input_tokens=64", "--output_tokens=8", "--requests=8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A config without weights."""
    folder = tmp_path_factory.mktemp("bare")
    families.write("qwen3", folder)
    (folder / "model.safetensors").unlink()
    return folder


def test_json(run_cli, bare):
    done = run_cli("size", f"--model={bare}", "--chip=v5e,h100", "--price=h100=2", *ASKED, "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    best = report["best"]
    assert best == report["candidates"][0]
    assert {one["chip"] for one in report["candidates"]} == {"v5e", "h100"}
    assert best.keys() >= {
        "chip", "topology", "chips", "mesh", "weights_dtype", "kv_dtype", "max_batch", "fits", "bytes_per_chip",
        "ttft_ms", "tpot_ms", "tokens_per_s", "usd_per_mtok", "bound",
    }  # fmt: skip
    assert best["bytes_per_chip"].keys() == {"weights", "kv", "temporaries"}
    assert 0 < best["tpot_ms"]["p50"] <= best["tpot_ms"]["p95"]
    assert best["chip"] in report["explanation"]
    assert "not a measurement" in report["uncertainty"]


def test_table(run_cli, bare):
    done = run_cli("size", f"--model={bare}", "--chip=v5e", "--topology=1x1", "--rate=5", *ASKED)
    assert done.code == 0, done.stderr
    head, _, row = (line.split("|") for line in done.stdout.splitlines()[:3])
    cells = dict(zip(map(str.strip, head), map(str.strip, row), strict=True))
    assert (cells["chip"], cells["topology"], cells["fits"], cells["meets"]) == ("v5e", "1x1", "yes", "yes")
    assert "v5e 1x1 (data=1, bf16) wins: $" in done.stdout
    assert "it is the only one that fits" in done.stdout


def test_gguf_and_a_trace(run_cli, data_dir, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n30,4\n20,5\n")
    done = run_cli(
        "size",
        f"--model={data_dir / 'stories260K.gguf'}",
        f"--trace={trace}",
        "--rate=1",
        "--chip=this",
        "--json",
    )
    assert done.code == 0, done.stderr
    best = json.loads(done.stdout.splitlines()[-1])["best"]
    assert (best["chip"], best["fits"], best["usd_per_mtok"]) == ("this", True, None)


@pytest.fixture
def aot(run_cli, bare):
    return lambda *more: run_cli(
        "size", f"--model={bare}", "--chip=v5e", "--topology=1x1", "--aot", *ASKED, *more
    )


@pytest.mark.filterwarnings("ignore:the TPU's attention kernel takes no 3 key/value heads")
def test_aot_asks_the_compiler(aot):
    done = aot("--json")
    assert done.code == 0, done.stderr
    best = json.loads(done.stdout.splitlines()[-1])["best"]
    found = best["compiled"]
    assert (best["fits"], best["not_compiled"], found["fits"], found["refusal"]) == (True, None, True, None)
    assert found["decode"]["weights"] == pytest.approx(best["bytes_per_chip"]["weights"], rel=0.05)
    assert found["prefill"].keys() == {"weights", "cache", "temporaries", "collectives"}
    assert found["cache_tokens"] > 72 * 16


def test_aot_without_the_compiler_says_what_to_install(aot, monkeypatch):
    monkeypatch.setattr("jaxopt_llm.sharding.topologies.importlib.util.find_spec", lambda name: None)
    done = aot()
    assert done.code == 0, done.stderr
    assert "v5e 1x1 is not compiled for: compiling for a TPU needs its compiler, libtpu" in done.stdout
    assert "v5e 1x1 (data=1, bf16) wins" in done.stdout, "what was counted still holds"


def test_runs_of_the_engine_are_fitted_to(run_cli, data_dir, tmp_path):
    model, runs = f"--model={data_dir / 'stories107K.gguf'}", tmp_path / "runs.json"
    bench = (
        "bench",
        "engine",
        model,
        "--prompt_tokens=32",
        "--output_tokens=8",
        "--repeats=1",
        f"--append={runs}",
    )
    for count in (1, 4):
        done = run_cli(*bench, f"--concurrency={count}")
        assert done.code == 0, done.stderr
    assert [run.concurrency for run in sizing.read_runs(runs)] == [1, 4]
    done = run_cli("size", model, "--chip=this", f"--calibrate={runs}", *ASKED, "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["held_out"]) == 2
    assert "fitted to 2 runs on this" in report["uncertainty"]


def test_a_calibrated_machine_takes_as_long_as_it_did(run_cli, data_dir, tmp_path):
    """Runs of a machine of which every factor is known; it is not measured anew."""
    model, runs = str(data_dir / "stories107K.gguf"), tmp_path / "runs.json"
    config, _ = checkpoints.read_config(model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = dataclasses.replace(
        CHIPS["t4"], name="this", kinds=(jax.devices()[0].device_kind,), hbm_bytes=memory, links=0
    )
    truth = dataclasses.replace(
        sizing.SERVER, weights=0.5, cache=0.3, flops=0.1, attention=0.02, layer_s=1e-6
    )

    def run(count: int, prompt: int, layers: int) -> sizing.Run:
        scaled = dataclasses.replace(config, num_layers=layers, windows=(None,) * layers)
        blank = sizing.Run(
            config=scaled, chip=chip, topology="1", mesh="data=1", weights="bf16", kv="bf16", prompt_tokens=prompt,
            output_tokens=32, concurrency=count, prefill_s=1.0, step_s=1.0,
        )  # fmt: skip
        prefill, step = blank.predicted(truth)
        return dataclasses.replace(blank, prefill_s=prefill, step_s=step)

    for count, prompt, layers in ((1, 16, 40), (8, 400, 40), (2, 200, 20), (1, 16, 20), (16, 64, 20)):
        sizing.append_run(runs, run(count, prompt, layers))
    asked = ("--concurrency=1", "--input_tokens=64", "--output_tokens=64", "--requests=4", "--json")
    done = run_cli("size", f"--model={model}", "--chip=this", f"--calibrate={runs}", *asked)
    assert done.code == 0, done.stderr
    best = json.loads(done.stdout.splitlines()[-1])["best"]
    known = run(1, 64, config.num_layers)
    assert best["tpot_ms"]["p50"] == pytest.approx(1e3 * known.step_s, rel=0.1)
    assert best["ttft_ms"]["p50"] == pytest.approx(1e3 * known.prefill_s, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh=tensor=2"], "--append takes no --mesh yet"),
        (["--dtype=bfloat16"], "--append takes no --dtype yet"),
        (["--cache_dtype=float16"], "--append takes no --cache_dtype=float16"),
        ([], "broken.json holds no runs"),
    ],
)
def test_runs_that_cannot_be_kept_are_refused_before_they_are_made(
    run_cli, data_dir, tmp_path, arguments, message
):
    broken = tmp_path / "broken.json"
    broken.write_text("[1]")
    done = run_cli(
        "bench", "engine", f"--model={data_dir / 'stories107K.gguf'}", f"--append={broken}", *arguments
    )
    assert done.code == 2
    assert message in done.stderr.splitlines()[-1]
    assert broken.read_text() == "[1]"


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plot(run_cli, bare, tmp_path, form):
    path = tmp_path / f"front.{form}"
    done = run_cli("size", f"--model={bare}", "--chip=v5e", f"--plot={path}", *ASKED)
    assert done.code == 0, done.stderr
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip=v9"], "chip v9 is unknown; known are this, v4"),
        (["--chip=v5e", "--topology=3x3", *ASKED], "there is no v5e slice '3x3'"),
        (["--chip=v5e", "--mesh=tensor=3", *ASKED], "mesh tensor=3 is of 3 devices"),
        (["--chip=h100", "--mesh=tensor=8", *ASKED], "does not divide"),
        (["--rate=1", "--concurrency=2"], "exclude each other"),
        (["--price=h100"], "--price=h100: could not convert"),
        (["--price=v9=1"], "--price=v9=1: chip v9 is unknown"),
        (["--trace=nowhere.csv"], "nowhere.csv: No such file"),
        (["--trace=nowhere.csv", "--spread=0.1"], "--spread would not be looked at"),
        (["--spread=1"], "spread=1.0 must be"),
        (["--plot=front.pdf"], "must end in .svg or .png"),
        (["--ttft_ms=0"], "ttft_ms=0.0 must be more than 0"),
    ],
)
def test_mistakes(run_cli, bare, arguments, message):
    done = run_cli("size", f"--model={bare}", *arguments)
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
