"""Whatever is wrong with a model, a prompt or a flag: exit code 2, one clear line, nothing half-written."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import families


@pytest.fixture
def refused(run_cli, tmp_path):
    """Runs a command that must fail; its one line of error."""

    def run(*arguments):
        done = run_cli(*arguments)
        assert done.code == 2, done
        assert done.stdout == ""
        *progress, line = done.stderr.splitlines()
        assert all(text.startswith("loading") for text in progress), done.stderr
        assert line.startswith("jaxopt-llm: error: ")
        return line.removeprefix("jaxopt-llm: error: ")

    return run


@pytest.fixture
def unloadable(refused, tmp_path):
    """Every command that loads a model refuses this one with the same line, and none writes anything."""

    def run(model):
        out = tmp_path / "out"
        out.mkdir()
        lines = {
            refused("generate", f"--model={model}", "--prompt=x"),
            refused("convert", f"--model={model}", f"--out={out / 'm'}", "--format=orbax"),
            refused(
                "convert", f"--model={model}", f"--out={out / 'm.gguf'}", "--format=gguf", "--quantize=int8"
            ),
        }
        assert len(lines) == 1, lines
        assert list(out.iterdir()) == []
        return lines.pop()

    return run


@pytest.fixture
def model(tmp_path):
    families.write("llama", tmp_path / "model")
    return tmp_path / "model"


def write_config(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def rewrite(model, change):
    """Changes the tensors of a directory."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def cut(path, size):
    data = path.read_bytes()
    path.write_bytes(data[:size])


def test_no_such_model(unloadable, tmp_path):
    line = unloadable(tmp_path / "none")
    assert line.startswith(f"{tmp_path / 'none'}: no such model; a model is a directory, a .gguf file, hf:")
    assert "smollm2-135m-instruct" in line


def test_a_directory_without_a_model(unloadable, tmp_path):
    (tmp_path / "empty").mkdir()
    line = unloadable(tmp_path / "empty")
    assert line.startswith(f"{tmp_path / 'empty'}: no config.json in this directory")


def test_a_directory_without_weights(unloadable, model):
    (model / "model.safetensors").unlink()
    line = unloadable(model)
    assert line.endswith(": neither model.safetensors nor model.safetensors.index.json is in this directory")


@pytest.mark.parametrize("size", [0, 5, 500, -1])
def test_truncated_safetensors(unloadable, model, size):
    path = model / "model.safetensors"
    cut(path, size if size >= 0 else path.stat().st_size - 1)
    line = unloadable(model)
    assert line.startswith(f"{path}: ")
    assert "truncated" in line or "the file is empty" in line


@pytest.mark.parametrize("size", [0, 3, 20, 5_000, 40_000, -1])
def test_truncated_gguf(unloadable, data_dir, tmp_path, size):
    path = tmp_path / "m.gguf"
    path.write_bytes((data_dir / "stories260K.gguf").read_bytes()[: size or None] if size else b"")
    line = unloadable(path)
    assert line.startswith(f"{path}: ")
    assert any(word in line for word in ("truncated", "the file is empty", "no GGUF file", "past the end"))


def test_a_safetensors_header_that_promises_more_than_there_is(unloadable, model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["model.norm.weight"]
    entry["shape"], entry["data_offsets"][1] = [2**40], entry["data_offsets"][0] + 2**42
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    size = 8 + len(text) + entry["data_offsets"][1]
    assert f"truncated: the header describes {size} bytes" in unloadable(model)


def test_a_safetensors_header_longer_than_its_file(unloadable, model):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**50) + path.read_bytes()[8:])
    assert f"a header of {2**50} bytes" in unloadable(model)


def test_a_gguf_header_that_promises_more_than_there_is(unloadable, data_dir, tmp_path):
    data = bytearray((data_dir / "stories260K.gguf").read_bytes())
    name = b"blk.4.ffn_up.weight"
    at = data.index(name) + len(name) + 4  # after the number of dimensions
    data[at : at + 8] = struct.pack("<Q", 2**40)
    (tmp_path / "m.gguf").write_bytes(data)
    assert "blk.4.ffn_up.weight" in unloadable(tmp_path / "m.gguf")


def test_tensors_that_do_not_fit_are_listed_together(unloadable, model):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.surprise.weight"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((7, 48), np.float32)

    rewrite(model, change)
    line = unloadable(model)
    assert line.startswith(f"{model}")
    for part in (
        "missing final_norm.weight (48,) (tensor 'model.norm.weight')",
        "missing layers.1.mlp.up.weight (88, 48) (tensor 'model.layers.1.mlp.up_proj.weight')",
        "unexpected tensor 'model.layers.7.surprise.weight'",
        "head.weight has shape (7, 48), the config wants (101, 48) (tensor 'lm_head.weight')",
    ):
        assert part in line


def test_an_unknown_architecture_lists_the_known(unloadable, model):
    write_config(model, model_type="mamba3", architectures=["Mamba3ForCausalLM"])
    line = unloadable(model)
    assert "mamba3" in line
    assert "gemma2, gemma3" in line


def test_an_unknown_gguf_architecture_lists_the_known(unloadable, data_dir, tmp_path):
    data = (data_dir / "stories260K.gguf").read_bytes()
    key = b"general.architecture" + struct.pack("<IQ", 8, 5)  # a string of 5 bytes follows
    (tmp_path / "m.gguf").write_bytes(data.replace(key + b"llama", key + b"rwkv9"))
    line = unloadable(tmp_path / "m.gguf")
    assert "rwkv9" in line
    assert "qwen2" in line


def test_a_setting_that_no_code_reads_is_named(unloadable, model):
    write_config(model, attention_dilation=3)
    assert "no code reads for model_type 'llama': attention_dilation=3" in unloadable(model)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "llama"}', "\xff"])
def test_a_damaged_config(unloadable, model, text):
    (model / "config.json").write_text(text, "latin-1")
    assert unloadable(model).startswith(f"{model / 'config.json'}: ")


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "48"}, {"num_hidden_layers": -1}, {"num_attention_heads": 0}, {"vocab_size": 2.5}],
)
def test_a_size_of_nonsense(unloadable, model, change):
    write_config(model, **change)
    ((key, value),) = change.items()
    assert f"config.json has {key}={value!r}; a whole number from 1 to" in unloadable(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_never_opened(unloadable, model, name):
    (model / "model.safetensors").rename(model / name)
    line = unloadable(model)
    assert name in line
    assert "a pickle can run any code when it is opened, so none ever is" in line


@pytest.mark.parametrize("name", ["model.bin", "model.pt"])
def test_a_pickle_by_its_name(unloadable, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert "a pickle can run any code" in unloadable(tmp_path / name)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--prompt=", "--prompt is empty"),
        ("--max_tokens=-1", "max_tokens=-1 must be a whole number of at least 1"),
        ("--max_tokens=0", "max_tokens=0 must be"),
        ("--temperature=nan", "temperature=nan must be a finite float32 of at least 0"),
        ("--temperature=-1", "temperature=-1.0 must be"),
        ("--top_p=0", "top_p=0.0 must be a number above 0 and at most 1"),
        ("--top_k=-3", "top_k=-3 must be"),
        ("--min_p=2", "min_p=2.0 must be"),
        ("--repetition_penalty=inf", "repetition_penalty=inf must be"),
        ("--stop=", "stop=[''] must be a string or several, none of them empty"),
        ("--dtype=int4", "dtype='int4' must be native, float32"),
        ("--quantize=int5", "unknown quantization 'int5'; known are int8, int8_block"),
        ("--mesh=tensor=7", "does not divide heads=8"),
        ("--mesh=stage=8", "mesh stage=8 has more stages than the model layers (5); take fewer"),
        (
            "--mesh=stage=2+2",
            "mesh stage=2+2 must be 2 numbers of at least 1 that add up to the model's 5 layers",
        ),
        ("--mesh=expert=2", "mesh expert=2 would split nothing: the model has no experts"),
        ("--mesh=tensor", "mesh axis 'tensor' needs a size, as in tensor=2"),
        ("--tempurature=1", "generate has no flag --tempurature (did you mean --temperature?)"),
        ("--max_tokens=ten", "flag --max_tokens=ten"),
    ],
)
def test_flags_of_generate(refused, data_dir, flag, message):
    model = f"--model={data_dir / 'stories260K.gguf'}"
    assert message in refused("generate", model, "--prompt=x", flag)


@pytest.mark.parametrize("axis", ["data", "stage"])
def test_axes_that_the_engine_alone_runs(refused, data_dir, tmp_path, axis):
    """Before the model is loaded."""
    text = f"--text={data_dir / 'wikitext.txt'}"
    for command in (["eval", text], ["optimize", "--config=int8", f"--out={tmp_path / 'out'}"]):
        line = refused(*command, f"--model={data_dir / 'stories260K.gguf'}", f"--mesh={axis}=2,tensor=4")
        assert line == f"--mesh={axis}=2,tensor=4: this command runs no {axis} axis; leave {axis} at 1"


def test_a_prompt_longer_than_the_context(refused, data_dir):
    line = refused("generate", f"--model={data_dir / 'stories260K.gguf'}", f"--prompt={'dog ' * 600}")
    assert line.startswith("the prompt has 1")
    assert "tokens and the context is 512; shorten it" in line


def test_chat_with_a_model_that_cannot(refused, data_dir):
    line = refused("generate", f"--model={data_dir / 'stories260K.gguf'}", "--prompt=x", "--chat")
    assert "no default chat template" in line


def test_a_text_prompt_without_a_tokenizer(refused, model):
    assert "need a tokenizer" in refused("generate", f"--model={model}", "--prompt=x")


def test_an_unknown_command(refused):
    assert refused("generat") == "no command 'generat' (did you mean generate?); see jaxopt-llm --help"


def test_in_a_process_of_its_own(run_cli, tmp_path):
    done = run_cli.subprocess("generate", f"--model={tmp_path / 'none'}", "--prompt=x")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"jaxopt-llm: error: {tmp_path / 'none'}: no such model")
    assert done.stderr.count("\n") == 1
