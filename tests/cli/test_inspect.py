"""`inspect`: what a model is, from headers alone."""

import dataclasses
import json
import shutil

import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints.files import Tensor
from jaxopt_llm.models import num_params, weights
from jaxopt_llm.sharding import topologies
from tests import families


@pytest.fixture
def inspect(run_cli, monkeypatch):
    def run(model):
        def refuse(*_):
            raise AssertionError("a weight was read")

        monkeypatch.setattr(Tensor, "read", refuse)
        monkeypatch.setattr(Tensor, "native", refuse)
        done = run_cli("inspect", f"--model={model}", "--json")
        monkeypatch.undo()
        assert done.code == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_gguf(inspect, data_dir):
    """Against the file's documented facts: 5 layers, 8 heads of 8, 4 KV heads, all float32."""
    path = data_dir / "stories260K.gguf"
    report = inspect(path)
    expected = {
        "path": str(path),
        "weights": "stored",
        "family": "llama",
        "parameters": 260_032,
        "bytes": 260_032 * 4,
        "bytes_by_dtype": {"F32": 260_032 * 4},
        "kv_bytes_per_token": 2 * 5 * 4 * 8 * 4,
        "kv_dtype": "float32",
        "max_seq_len": 512,
        "num_layers": 5,
        "head_dim": 8,
    }
    assert {key: report[key] for key in expected} == expected
    assert report["shapes"]["layers.*.mlp.gate.weight"] == [172, 64]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3", "gpt_oss_mxfp4", "qwen3_moe"])
def test_families(inspect, tmp_path, name):
    families.write(name, tmp_path)
    report = inspect(tmp_path)
    model, _ = jo.load(tmp_path)
    stored = families.weights(name)
    assert report["parameters"] == num_params(model)
    assert report["bytes"] == sum(array.nbytes for array in stored.values())
    assert report["family"] == model.config.family
    assert report["max_seq_len"] == model.config.max_seq_len


def test_our_own_format(inspect, storyteller, tmp_path):
    model = jo.quantize(jo.load(storyteller)[0], "int8")
    jo.save(model, None, tmp_path / "out")
    report = inspect(tmp_path / "out")
    sizes = {name: value.size for name, value in weights(jo.load(storyteller)[0]).items()}
    assert report["bytes_by_dtype"]["int8"] == sum(size for name, size in sizes.items() if "norm" not in name)
    assert report["bytes"] == sum(report["bytes_by_dtype"].values())


def test_a_bare_config(inspect, run_cli, tmp_path):
    families.write("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    report = inspect(tmp_path)
    assert report["weights"] == "absent; bytes are those in memory as float32"
    assert report["bytes"] == 4 * report["parameters"] == report["bytes_by_dtype"]["float32"]


def test_table(run_cli, storyteller):
    done = run_cli("inspect", f"--model={storyteller}")
    assert done.code == 0
    assert "kv_bytes_per_token  1,280\n" in done.stdout
    assert "bytes_by_dtype      F32 1,040,128\n" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "layers.*.mlp.down.weight" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["64 x 172", "5", "55,040", "21.2%"]


def test_layers_of_several_kinds_have_a_row_each(run_cli, tmp_path):
    """qwen3_moe with a dense layer among those with experts."""
    families.write("qwen3_moe", tmp_path)
    lines = run_cli("inspect", f"--model={tmp_path}").stdout.splitlines()
    rows = [line.split("|") for line in lines if "|" in line]
    counts = {row[1].strip(): row[3].strip() for row in rows}
    assert (counts["layers.*.moe.up.weight"], counts["layers.*.mlp.up.weight"]) == ("2", "1")


def test_an_alias_shows_the_file_it_means(inspect, data_dir, tmp_path, monkeypatch):
    """One that lies in the cache already, of another size here."""
    stories, packed = data_dir / "stories260K.gguf", checkpoints.ALIASES["gemma3-270m"]
    file = tmp_path / "jaxopt_llm" / packed.file
    file.parent.mkdir()
    shutil.copyfile(stories, file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shorter = dataclasses.replace(packed, size=stories.stat().st_size)
    monkeypatch.setitem(checkpoints.ALIASES, "gemma3-270m", shorter)
    assert inspect("gemma3-270m")["path"] == str(file)


def test_step(run_cli, storyteller):
    done = run_cli("inspect", f"--model={storyteller}", "--step", "--context=128", "--rows=2", "--json")
    assert done.code == 0, done.stderr
    step = json.loads(done.stdout.splitlines()[-1])
    assert (step["rows"], step["context"]) == (2, 128)
    assert step["machine"]["measured"]
    assert [one["name"] for one in step["fusions"]] == ["qkv", "norm", "gate_up", "sampling"]
    assert step["launched"] == pytest.approx(sum(part["count"] * part["launched"] for part in step["parts"]))


def test_step_as_tables(run_cli, storyteller):
    done = run_cli("inspect", f"--model={storyteller}", "--step", "--context=128", "--nofusions")
    assert done.code == 0, done.stderr
    assert "A decode step of 1 x 128 tokens on cpu\n" in done.stdout
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if "|" in line]
    assert names[2] == "embed"
    assert names[-4:] == ["head", "sampling", "other", "total"]
    assert "q, k and v in one product" not in done.stdout


@pytest.mark.filterwarnings("ignore:the TPU's attention kernel takes no 4 key/value heads of width 8")
def test_step_on_a_chip_that_is_not_there(run_cli, storyteller):
    done = run_cli(
        "inspect", f"--model={storyteller}", "--step", "--context=128", "--nofusions", "--chip=v5e", "--json"
    )
    assert done.code == 0, done.stderr
    machine = json.loads(done.stdout.splitlines()[-1])["machine"]
    assert machine == {"name": "v5e", "bandwidth": 819e9, "flops": 197e12, "measured": False}


def test_step_on_a_gpu_without_its_compiler(run_cli, storyteller, monkeypatch):
    monkeypatch.setattr(topologies, "_cuda_plugin", lambda: None)
    done = run_cli("inspect", f"--model={storyteller}", "--step", "--chip=h100")
    assert done.code == 2
    assert (
        "--chip=h100: compiling for a GPU needs its compiler: pip install --no-deps jax-cuda12" in done.stderr
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chip=v9"], "--chip=v9 is unknown; known are here, v4"),
        (["--rows=0"], "rows=0 must be at least 1"),
        (["--quantize=int7"], "int7"),
        (["--chip=v5e", "--dtype=native"], "name --quantize instead, or --chip=here"),
    ],
)
def test_steps_that_are_refused(run_cli, storyteller, flags, message):
    done = run_cli("inspect", f"--model={storyteller}", "--step", *flags)
    assert done.code == 2
    assert message in done.stderr
