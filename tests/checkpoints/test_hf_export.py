"""Hugging Face directories that we write: read back they are the same model. transformers: `tests/parity/`."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import abstract, weights
from jaxopt_llm.models.families import parse_config, write_config
from tests import families


@pytest.mark.parametrize("name", families.TINY)
def test_every_family_comes_back(tmp_path, name):
    """The same config and the same bits in every parameter: the same function, so the same logits."""
    families.write(name, tmp_path / "in")
    model, _ = jo.load(tmp_path / "in")
    checkpoints.export_hf(model, None, tmp_path / "out")
    again, _ = jo.load(tmp_path / "out")
    assert again.config == model.config
    values, expected = weights(again), weights(model)
    assert values.keys() == expected.keys()
    for parameter, value in expected.items():
        np.testing.assert_array_equal(values[parameter], value, err_msg=parameter)


@pytest.mark.parametrize("name", sorted({"gemma3", "gpt_oss_mxfp4"} ^ families.TINY.keys()))
def test_tensors_are_those_that_came(tmp_path, name):
    """Names, shapes and values of the original files; those two are written as text model and as floats."""
    families.write(name, tmp_path / "in")
    checkpoints.export_hf(jo.load(tmp_path / "in")[0], None, tmp_path / "out")
    written, original = load_file(tmp_path / "out" / "model.safetensors"), families.weights(name)
    assert written.keys() == original.keys()
    for tensor, value in original.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    families.write("qwen3_moe", directory)
    return directory


@pytest.fixture(scope="module")
def model(source):
    return jo.load(source)[0]


def test_quantized_weights_become_the_floats_they_stand_for(source, tmp_path):
    small, _ = jo.load(source, quantize="int8")
    checkpoints.export_hf(small, None, tmp_path / "out")
    values = weights(jo.load(tmp_path / "out")[0])
    for name, value in weights(small).items():
        expected = value.dequantize() if isinstance(value, QArray) else value
        np.testing.assert_allclose(values[name], expected, rtol=1e-7, err_msg=name)


LOCAL_LINEAR = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"hidden_activation": "gelu"}),
        ("gemma3_text", {"hidden_activation": "gelu"}),
        ("gemma3_text", LOCAL_LINEAR),
        ("gemma2", {"query_pre_attn_scalar": 23.7}),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 8}
         | {"use_sliding_window": True}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("llama", {"eos_token_id": None}),
        ("llama", {"eos_token_id": [2, 3]}),
    ],
)  # fmt: skip
def test_configs_come_back(name, changes):
    config = parse_config(families.TINY[name] | changes)
    assert parse_config(write_config(config, "float32")) == config


def test_no_end_token_is_null():
    config = parse_config(families.LLAMA | {"eos_token_id": None})
    assert write_config(config, "float32")["eos_token_id"] is None


def test_a_uniform_mistral_stays_one():
    """transformers takes a mistral with `layer_types` for a ministral."""
    assert "layer_types" not in write_config(parse_config(families.MISTRAL), "float32")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3_moe",
            {"windows": (None, 8, None)},
            r"qwen3_moe models cannot have windows=\(None, 8, None\)",
        ),
        ("mixtral", {"windows": (8, None, 8)}, r"mixtral models cannot have windows=\(8, None, 8\)"),
        ("mistral", {"windows": (8, 16, 8, 16)}, r"mistral models cannot have windows=\(8, 16, 8, 16\)"),
        (
            "llama",
            {"query_scale": 0.5, "logit_softcap": 3.0},
            "cannot have query_scale=0.5, logit_softcap=3.0",
        ),
        (
            "qwen2",
            {"activation": "gelu", "o_bias": True},
            "qwen2 models cannot have o_bias=True; keep our own",
        ),
        ("gemma3_text", {"rope_local": None}, "cannot have rope_local=None"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, name, changes, message):
    config = dataclasses.replace(parse_config(families.TINY[name]), **changes)
    with pytest.raises(ValueError, match=message):
        checkpoints.export_hf(abstract(config), None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "dtype", "width", "message"),
    [
        *(
            (name, "float32", 45, rf"refuses {name} models whose num_heads=\d do not divide d_model=45")
            for name in ("llama", "gemma2", "gemma3_text")
        ),
        ("mixtral", "float32", 42, "d_model=42: .* rows of whole 16 bytes; prune to a multiple of 4"),
        ("qwen3_moe", "bfloat16", 36, "d_model=36: .* rows of whole 16 bytes; prune to a multiple of 8"),
    ],
)
def test_widths_that_transformers_does_not_take_are_refused(tmp_path, name, dtype, width, message):
    config = dataclasses.replace(parse_config(families.TINY[name]), d_model=width)
    with pytest.raises(ValueError, match=message):
        checkpoints.export_hf(abstract(config, jnp.dtype(dtype)), None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_dtype_is_the_models(model, tmp_path):
    checkpoints.export_hf(model, None, tmp_path / "float32")
    half, _ = jo.load(tmp_path / "float32", dtype="bfloat16")
    checkpoints.export_hf(half, None, tmp_path / "bfloat16")
    tensors = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {jnp.dtype(jnp.bfloat16)}
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_sharded_model_is_written_whole(model, tmp_path):
    checkpoints.export_hf(model, None, tmp_path / "one")
    placed, _ = jo.load(tmp_path / "one", mesh="expert=2,tensor=2")
    checkpoints.export_hf(placed, None, tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_tokenizer_comes_along(tmp_path, data_dir):
    model, tokenizer = jo.load(data_dir / "stories260K.gguf")
    checkpoints.export_hf(model, tokenizer, tmp_path / "out")
    again, reread = jo.load(tmp_path / "out")
    assert again.config == model.config
    text = "Once upon a time, Zoë's <s> 🦊"
    assert reread.encode(text) == tokenizer.encode(text)
    assert reread.eos_ids == tokenizer.eos_ids
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_only_checkpoints_are_replaced(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("...")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        checkpoints.export_hf(model, None, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]
