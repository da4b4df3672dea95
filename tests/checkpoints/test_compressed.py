"""compressed-tensors directories: written by hand and by us, both read. `tests/parity` asks the package itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import CheckpointError, safetensors
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import weights
from tests.engine import oracle

FORMATS = ["w8a8", "int8", "int8_g32", "int8_g64_zero", "int4_g32", "int4_g64_zero"]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    """A model of each format, and where it was exported."""
    model, out = oracle.wide(request.param), tmp_path_factory.mktemp("compressed") / "out"
    checkpoints.export_hf(model, None, out, codes=True)
    return model, out


def in_layers(name):
    return name.startswith("layers.") and "norm" not in name


def test_codes_come_back(written):
    model, out = written
    restored, _ = jo.load(out, dtype="native")
    for name, value in weights(model).items():
        own = weights(restored)[name]
        if not in_layers(name):
            exact = value.dequantize() if isinstance(value, QArray) else value
            np.testing.assert_array_equal(own, exact)
            continue
        assert isinstance(own, QArray)
        assert (own.bits, own.act, own.group) == (value.bits, value.act, value.group)
        np.testing.assert_array_equal(own.data, value.data)
        np.testing.assert_array_equal(own.dequantize(), value.dequantize())


def test_floats_are_the_values(written):
    model, out = written
    restored = weights(jo.load(out, dtype="float32")[0])
    for name, value in weights(model).items():
        exact = value.dequantize() if isinstance(value, QArray) else value
        np.testing.assert_array_equal(restored[name], exact)


def test_shards_read_their_own_rows(written):
    model, out = written
    restored, _ = jo.load(out, dtype="native", mesh="tensor=2")
    for name, value in weights(restored).items():
        if in_layers(name):
            np.testing.assert_array_equal(value.dequantize(), weights(model)[name].dequantize())


def by_hand(bits, symmetric):
    """A weight in float64, and its tensors, code by code as the format's words have it."""
    rng, per_word, half = np.random.default_rng(bits), 32 // bits, 2 ** (bits - 1)
    codes = rng.integers(-half, half, (128, 64))
    zeros = rng.integers(-half, half, (128, 2)) if not symmetric else np.zeros((128, 2), int)
    scale = rng.uniform(0.01, 0.02, (128, 2)).astype(np.float16)
    packed, packed_zeros = (
        np.zeros((128, 64 // per_word), np.uint32),
        np.zeros((128 // per_word, 2), np.uint32),
    )
    for row in range(128):
        for column in range(64):
            shift = bits * (column % per_word)
            packed[row, column // per_word] |= np.uint32(int(codes[row, column]) + half << shift)
        for group in range(2):
            shift = bits * (row % per_word)
            packed_zeros[row // per_word, group] |= np.uint32(int(zeros[row, group]) + half << shift)
    values = (codes - np.repeat(zeros, 32, 1)) * np.repeat(scale.astype(np.float64), 32, 1)
    tensors = {"packed": packed.view(np.int32), "scale": scale, "shape": np.array([128, 64])}
    return values, tensors if symmetric else tensors | {"zero_point": packed_zeros.view(np.int32)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An exported float model: its tensors, and its config.json."""
    out = tmp_path_factory.mktemp("plain") / "out"
    checkpoints.export_hf(oracle.wide(), None, out)
    with safetensors.open_directory(out) as source:
        return {name: tensor.read() for name, tensor in source.items()}, json.loads(
            (out / "config.json").read_text()
        )


def write(directory, plain, tensors, config):
    """The plain model with q of the first layer in this form."""
    directory.mkdir()
    floats, settings = plain
    everything = {name: value for name, value in floats.items() if name != Q}
    everything |= {f"{Q}_{part}": value for part, value in tensors.items()}
    safetensors.write(directory, [(n, a.shape, a.dtype, a) for n, a in everything.items()], {})
    (directory / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return directory


def settings(bits=4, symmetric=True, targets=("Linear",), act=None, **changes):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    group = {"targets": list(targets), "weights": weights | changes, "input_activations": act}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", ["Linear", r"re:.*self_attn\.q_proj$", Q.removesuffix(".weight")])
def test_what_others_write(plain, tmp_path, bits, symmetric, target):
    values, tensors = by_hand(bits, symmetric)
    directory = write(tmp_path / "in", plain, tensors, settings(bits, symmetric, [target]))
    own = weights(jo.load(directory, dtype="native")[0])["layers.0.attention.q.weight"]
    assert own.bits == bits
    np.testing.assert_allclose(own.dequantize(), values, rtol=1e-6, atol=1e-7)
    floats = weights(jo.load(directory, dtype="float32")[0])["layers.0.attention.q.weight"]
    np.testing.assert_array_equal(floats, own.dequantize())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (settings(actorder="group"), "without actorder=group"),
        (settings(bits=3), "supported are pack-quantized of 8 or 4 bits"),
        (settings(strategy="tensor"), "a scale a channel or group"),
        (
            settings(act={"num_bits": 8, "dynamic": False}),
            "input_activations={'num_bits': 8, 'dynamic': False}; only",
        ),
        (
            settings() | {"kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme={'num_bits': 8}, which is not supported",
        ),
        (settings() | {"config_groups": {"W4A16": ["Linear"]}}, "presets by name are not supported"),
        (settings(symmetric=False), "missing layers.0.attention.q.weight"),
    ],
)
def test_what_would_change_results_is_refused(plain, tmp_path, config, message):
    directory = write(tmp_path / "in", plain, by_hand(4, True)[1], config)
    with pytest.raises(CheckpointError, match=message.replace("{", r"\{")):
        jo.load(directory)


@pytest.mark.parametrize("format", ["int8_block", "int4_g64_min", "int3_g32", "fp8", None])
def test_forms_that_the_format_does_not_have_are_refused(format, tmp_path):
    message = (
        "in a form that compressed-tensors does not have; those it has"
        if format
        else "no product .* quantized"
    )
    with pytest.raises(ValueError, match=message):
        checkpoints.export_hf(oracle.wide(format), None, tmp_path / "out", codes=True)
    assert not (tmp_path / "out").exists()


def test_several_forms_and_floats_in_one_model(tmp_path):
    rules = [("down", None), ("mlp", "int4_g32_zero"), ("embed|head", None)]
    model = jo.quantize(oracle.wide(), "w8a8", rules=rules)
    checkpoints.export_hf(model, None, tmp_path / "out", codes=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {"lm_head", "model.layers.0.mlp.down_proj"} <= set(config["ignore"])
    restored, _ = jo.load(tmp_path / "out", dtype="native")
    for name, value in weights(model).items():
        own = weights(restored)[name]
        assert type(own) is type(value)
        values = lambda w: w.dequantize() if isinstance(w, QArray) else w
        np.testing.assert_array_equal(values(own), values(value))


def test_experts(tmp_path):
    model = jo.quantize(oracle.tiny("mixtral", d_model=64), "int8", rules=[("embed|head", None)])
    checkpoints.export_hf(model, None, tmp_path / "out", codes=True)
    restored, _ = jo.load(tmp_path / "out", dtype="native")
    jax.tree.map(np.testing.assert_array_equal, weights(restored), weights(model))
    assert weights(restored)["layers.0.moe.gate.weight"].data.dtype == jnp.int8
