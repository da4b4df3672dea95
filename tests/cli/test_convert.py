"""`convert`: every format from every format, with what was asked for and nothing else."""

import json

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import weights
from tests import families

NAMES = {"orbax": "model", "hf": "model", "gguf": "model.gguf"}


@pytest.fixture
def convert(run_cli):
    def run(model, out, *options):
        done = run_cli("convert", f"--model={model}", f"--out={out}", "--json", *options)
        assert done.code == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Of float32 values that float16 holds, so that GGUF loses nothing."""
    directory = tmp_path_factory.mktemp("qwen")
    families.write("qwen3", directory)
    model, _ = jo.load(directory, dtype="float16")
    checkpoints.export_hf(model, None, directory)
    return directory


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_there_and_back(convert, qwen, tmp_path, first, second):
    """The second form of the first form is the model, and the report is true."""
    source = qwen
    for step, kind in enumerate((first, second)):
        out = tmp_path / str(step) / NAMES[kind]
        report = convert(source, out, f"--format={kind}", "--dtype=float32")
        files = {"orbax": out.rglob("*"), "hf": [out / "model.safetensors"], "gguf": [out]}[kind]
        size = sum(path.stat().st_size for path in files if path.is_file())
        assert report == {"out": str(out), "format": kind, "bytes": size}
        source = out
    values, expected = weights(jo.load(source)[0]), weights(jo.load(qwen)[0])
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)


def test_a_table_without_json(run_cli, qwen, tmp_path):
    done = run_cli("convert", f"--model={qwen}", f"--out={tmp_path / 'o'}", "--format=orbax")
    assert done.stdout.splitlines()[0] == f"out     {tmp_path / 'o'}"


def test_quantized_weights_stay_so_in_our_own_format(convert, storyteller, tmp_path):
    convert(storyteller, tmp_path / "out", "--format=orbax", "--quantize=int8")
    model, tokenizer = jo.load(tmp_path / "out")
    assert isinstance(model.layers[0].mlp.up.weight.get_value(), QArray)
    assert tokenizer.chat_templates == jo.load(storyteller)[1].chat_templates


@pytest.mark.parametrize(
    ("options", "storage"), [([], "F16"), (["--gguf_type=F16"], "F16"), (["--gguf_type=q8_0"], "Q8_0")]
)
def test_gguf_type(convert, storyteller, tmp_path, options, storage):
    convert(storyteller, tmp_path / "m.gguf", "--format=gguf", *options)
    assert checkpoints.stored_bytes(tmp_path / "m.gguf").keys() == {storage, "F32"} | {"F16"}  # 172 columns


def test_dtype(convert, storyteller, tmp_path):
    convert(storyteller, tmp_path / "out", "--format=hf", "--dtype=bfloat16")
    assert checkpoints.stored_bytes(tmp_path / "out").keys() == {"BF16"}


def test_blocks_of_a_gguf_file_go_through_unchanged(convert, qwen, tmp_path):
    """`--dtype=native` keeps them; the group of 32 divides no width of this model but its heads'."""
    convert(qwen, tmp_path / "1.gguf", "--format=gguf", "--gguf_type=Q8_0")
    convert(tmp_path / "1.gguf", tmp_path / "ours", "--format=orbax", "--dtype=native")
    convert(tmp_path / "ours", tmp_path / "2.gguf", "--format=gguf", "--gguf_type=Q8_0")
    first, second = (jax.tree.leaves(weights(jo.load(tmp_path / f"{n}.gguf")[0])) for n in (1, 2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


def test_codes_for_others(convert, qwen, tmp_path):
    """Layers as vLLM reads them; what `--dtype=native` reads of them is what was rounded."""
    out = tmp_path / "out"
    assert (
        convert(qwen, out, "--format=compressed-tensors", "--quantize=int8")["format"] == "compressed-tensors"
    )
    written, rounded = weights(jo.load(out, dtype="native")[0]), weights(jo.load(qwen, quantize="int8")[0])
    for name, value in rounded.items():
        if name.startswith("layers."):
            jax.tree.map(np.testing.assert_array_equal, written[name], value)


def test_a_warning_is_one_line(run_cli, tmp_path):
    families.write("gemma3", tmp_path / "in")
    arguments = (f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--format=hf")
    done = run_cli.subprocess("convert", *arguments)
    assert done.code == 0, done.stderr
    (told,) = (line for line in done.stderr.splitlines() if "skipped" in line)
    assert told.startswith(f"jaxopt-llm: warning: {tmp_path / 'in'}")
    assert told.endswith(": loaded the text model, skipped multi_modal_projector, vision_tower")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=orbax", "--gguf_type=Q8_0"], "--gguf_type=Q8_0 is for --format=gguf, not orbax; drop it"),
        (["--format=onnx"], "flag --format=onnx: value should be one of <orbax|hf|compressed-tensors|gguf>"),
        (["--format=gguf", "--gguf_type=Q4_0"], "--gguf_type=Q4_0: value should be one of"),
        ([], "convert needs --format"),
        (["--format=gguf"], "out must end in .gguf, or no command finds a model in it; try"),
    ],
)
def test_mistakes_write_nothing(run_cli, qwen, tmp_path, options, message):
    done = run_cli("convert", f"--model={qwen}", f"--out={tmp_path / 'out'}", *options)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_replaced(run_cli, qwen, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("...")
    (tmp_path / "thesis" / "config.json").write_text('{"port": 80}')  # thousands of programs write one
    for kind in NAMES:
        done = run_cli("convert", f"--model={qwen}", f"--out={tmp_path / 'thesis'}", f"--format={kind}")
        assert done.code == 2
        assert str(tmp_path / "thesis") in done.stderr
    assert {path.name for path in tmp_path.rglob("*")} == {"thesis", "chapter.txt", "config.json"}


@pytest.mark.parametrize("kind", NAMES)
def test_places_are_checked_before_anything_is_loaded(run_cli, tmp_path, kind):
    """The model would not be found."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("...")
    (tmp_path / "file").touch()
    taken = "a directory stands where a file" if kind == "gguf" else "not replaced, since it is no checkpoint"
    for out, message in (
        ("", "--out is empty"),
        ("gs://bucket/model.gguf", "--out=gs://bucket/model.gguf is remote; name a local path"),
        (tmp_path / "thesis", taken),
        (tmp_path / "file" / "below", "a file, so no directory can be made below it"),
    ):
        done = run_cli("convert", f"--model={tmp_path / 'none'}", f"--out={out}", f"--format={kind}")
        assert (done.code, done.stdout) == (2, "")
        assert message in done.stderr


def test_the_home_directory(convert, qwen, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(qwen, "~/model", "--format=orbax")["out"] == str(tmp_path / "model")
    assert checkpoints.read_config(tmp_path / "model")[0].family == "qwen3"
