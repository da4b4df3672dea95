"""Models out of GGUF files: files written by others, by hand, and metadata that cannot be used."""

import math
import re

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import CheckpointError, gguf, gguf_config
from jaxopt_llm.checkpoints.gguf_model import tensor_name
from jaxopt_llm.models import Rope, from_params, weights
from tests import exportable, families


@pytest.fixture
def llama(tmp_path):
    """A writer of tiny llama files, in which some keys or tensors are others (None: left out)."""
    path = tmp_path / "llama.gguf"
    checkpoints.export_gguf(exportable.model("llama"), None, path, dtype="F32")
    with gguf.open_file(path) as source:
        metadata = source.metadata
        tensors = {name: tensor.read() for name, tensor in source.items()}

    def write(keys=(), changed=()):
        keys = metadata | {f"llama.{key}": value for key, value in dict(keys).items()}
        arrays = tensors | dict(changed)
        kept = [(name, x.shape, "F32", x) for name, x in arrays.items() if x is not None]
        gguf.write(path, {key: value for key, value in keys.items() if value is not None}, kept)
        return path

    return write


def test_a_file_by_others_tells_its_story(data_dir):
    """llama2.c's own greedy text; the q and k rows of the file are interleaved."""
    model, tokenizer = jo.load(data_dir / "stories260K.gguf", dtype="float32")
    (result,) = jo.generate(model, tokenizer, [[1]], max_tokens=48, temperature=0.0)
    assert result.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


def test_native_is_the_same_model(tmp_path):
    path = tmp_path / "model.gguf"
    checkpoints.export_gguf(exportable.model("llama", **exportable.WIDE), None, path, dtype="Q8_0")
    as_float, native = (weights(jo.load(path, dtype=dtype)[0]) for dtype in ("float32", "native"))
    kept = {name for name, weight in native.items() if isinstance(weight, jo.QArray)}
    assert kept == {name for name, weight in native.items() if weight.ndim == 2}
    for name, expected in as_float.items():
        weight = native[name]
        actual = weight.dequantize() if name in kept else weight
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_mxfp4_experts(tmp_path):
    """gpt-oss's expert blocks as llama.cpp's converter lays them out, against the same from safetensors."""
    families.write("gpt_oss_mxfp4", tmp_path / "hf")
    reference, _ = checkpoints.load(tmp_path / "hf", dtype="float32")
    config = exportable.config("gpt_oss", hidden_size=64, intermediate_size=96)
    checkpoints.export_gguf(
        from_params(config, weights(reference)), None, tmp_path / "floats.gguf", dtype="F32"
    )
    packed = families.weights("gpt_oss_mxfp4")
    with gguf.open_file(tmp_path / "floats.gguf") as source:
        tensors = {name: (tensor.shape, "F32", tensor.read()) for name, tensor in source.items()}
        for layer in range(config.num_layers):
            experts = f"model.layers.{layer}.mlp.experts"
            for ours, theirs, rows in (
                ("gate", "gate_up", slice(0, None, 2)),
                ("up", "gate_up", slice(1, None, 2)),
                ("down", "down", slice(None)),
            ):
                name = f"blk.{layer}.ffn_{ours}_exps.weight"
                codes, scales = (packed[f"{experts}.{theirs}_proj_{part}"] for part in ("blocks", "scales"))
                raw = _mxfp4_blocks(codes[:, rows], scales[:, rows])
                tensors[name] = tensors[name][0], "MXFP4", raw
        gguf.write(
            tmp_path / "mxfp4.gguf", source.metadata, [(name, *spec) for name, spec in tensors.items()]
        )
    loaded, _ = checkpoints.load(tmp_path / "mxfp4.gguf", dtype="float32")
    assert loaded.config == config
    for name, expected in weights(reference).items():
        np.testing.assert_array_equal(weights(loaded)[name], expected, err_msg=name)


def _mxfp4_blocks(codes, scales):
    """GGML keeps the scale before the codes, and element j beside j + 16; OpenAI's files 2j beside 2j + 1."""
    elements = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)
    halves = elements[..., :16] | elements[..., 16:] << 4
    return np.concatenate([scales[..., None], halves], axis=-1).reshape(*codes.shape[:-2], -1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.unheard_of", 2.0, "settings that no code reads: llama.rope.scaling.unheard_of=2.0"),
        ("attention.sliding_window", 16, "no code reads: llama.attention.sliding_window=16"),
        ("attention.head_count_kv", [3, 3, 1], "head_count_kv differs between layers"),
        ("attention.value_length", 4, "attention.value_length and rope.dimension_count must be equal"),
        ("rope.dimension_count", 4, "attention.value_length and rope.dimension_count must be equal"),
        (
            "rope.scaling.type",
            "longrope",
            "unknown rope.scaling.type 'longrope'; known are none, linear, yarn",
        ),
        ("feed_forward_length", None, "the metadata have no llama.feed_forward_length"),
        ("embedding_length", None, "the metadata have no llama.embedding_length"),
        ("embedding_length", "48", "llama.embedding_length is '48', of the wrong type"),
        ("attention.head_count", 0, "llama.attention.head_count=0 is no number above 0"),
        ("attention.layer_norm_rms_epsilon", math.nan, "layer_norm_rms_epsilon=nan is no number above 0"),
        ("block_count", 10**9, "block_count=1000000000, but there are only"),
        ("expert_count", 8, "the metadata have no llama.expert_used_count"),
    ],
)
def test_metadata_that_cannot_be_used(llama, key, value, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints.load(llama({key: value}))


def test_unknown_architecture_lists_the_known(tmp_path):
    gguf.write(tmp_path / "rwkv.gguf", {"general.architecture": "rwkv7"}, [])
    known = "gemma2, gemma3, gpt-oss, llama, olmo2, qwen2, qwen3, qwen3moe"
    with pytest.raises(CheckpointError, match=f"unknown general.architecture 'rwkv7'; known are {known}"):
        checkpoints.load(tmp_path / "rwkv.gguf")


def test_every_tensor_that_does_not_fit_is_listed(llama):
    odd = np.zeros((47, 48), np.float32)
    changed = {
        "blk.0.attn_q.weight": odd,  # 47 rows cannot be six heads
        "blk.1.ffn_up.weight": None,
        "blk.2.attn_norm.bias": odd[0],
    }
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(llama(changed=changed))
    assert caught.value.problems == [
        "missing layers.1.mlp.up.weight (88, 48) (tensor 'blk.1.ffn_up.weight')",
        "layers.0.attention.q.weight has shape (47, 48), the config wants (48, 48) "
        "(tensor 'blk.0.attn_q.weight')",
        "unexpected tensor 'blk.2.attn_norm.bias'",
    ]


def test_equal_values_for_every_layer_are_one(llama):
    path = llama({"attention.head_count_kv": [3, 3, 3], "feed_forward_length": [88] * 3})
    assert checkpoints.read_config(path)[0] == exportable.config("llama")


def test_numbers_are_as_short_as_in_the_config_they_came_from(llama):
    assert checkpoints.read_config(llama())[0].norm_eps == 1e-5


def _llama3_factors(*, theta, head_dim, factor, low, high, original):
    """As the release of Llama 3.1 scales its frequencies, one by one."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def _shapes(layers=2):
    layer = {f"blk.{i}.attn_norm.weight": (256,) for i in range(layers)}
    return {"token_embd.weight": (64, 256), "output.weight": (64, 256)} | layer


def _metadata(architecture, **keys):
    common = {
        "block_count": 2,
        "context_length": 131072,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    keys = {key.replace("__", "."): value for key, value in keys.items()}
    named = {f"{architecture}.{key}": value for key, value in (common | keys).items()}
    return {"general.architecture": architecture} | named


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])  # Llama 3.1; 3.2
@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 8192), (2.0, 8.5, 4096)])
def test_llama3_scaling_is_found_in_its_factors(factor, head_dim, low, high, original):
    factors = _llama3_factors(
        theta=5e5, head_dim=head_dim, factor=factor, low=low, high=high, original=original
    )
    metadata = _metadata("llama", rope__freq_base=5e5, attention__key_length=head_dim)
    metadata |= {"llama.attention.value_length": head_dim}
    if original != 8192:
        metadata["llama.rope.scaling.original_context_length"] = original
    config = gguf_config.to_config(metadata, _shapes(), factors)
    assert config.rope == Rope(
        theta=5e5,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=original,
    )


OTHER_FACTORS = {
    "even": np.linspace(1, 8, 64),
    "falling": np.linspace(8, 1, 64),
    "steps": np.repeat([1.0, 3.0, 8.0, 8.0], 16),
    "too few": np.ones(32),
    "no numbers": np.full(64, np.nan),
    "negative": -np.ones(64),
}


@pytest.mark.parametrize("factors", OTHER_FACTORS.values(), ids=OTHER_FACTORS)
def test_other_factors_are_refused(factors):
    with pytest.raises(ValueError, match="rope_freqs"):
        gguf_config.to_config(_metadata("llama"), _shapes(), factors.astype(np.float32))


def test_factors_of_one_are_no_scaling():
    config = gguf_config.to_config(_metadata("llama"), _shapes(), np.ones(64, np.float32))
    assert config.rope == Rope()


def test_a_factor_alone_is_linear_scaling():
    config = gguf_config.to_config(_metadata("qwen2", rope__scaling__factor=4.0), _shapes())
    assert config.rope == Rope(kind="linear", factor=4.0)


def test_what_gemma2_leaves_unsaid():
    config = gguf_config.to_config(_metadata("gemma2"), _shapes())
    assert (config.attention_softcap, config.logit_softcap, config.windows) == (50.0, 30.0, (4096, None))
    assert (config.query_scale, config.tied) == (128**-0.5, True)


def test_what_gemma3_leaves_unsaid():
    metadata = _metadata("gemma3", block_count=7, attention__sliding_window=512, rope__freq_base=1e6)
    config = gguf_config.to_config(metadata, _shapes(layers=7))
    assert config.windows == (512,) * 5 + (None, 512)
    assert (config.rope, config.rope_local) == (Rope(theta=1e6), Rope(theta=1e4))
    del metadata["gemma3.attention.sliding_window"]
    assert gguf_config.to_config(metadata, _shapes(layers=7)).windows == (None,) * 7


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_queries_otherwise(architecture, layers):
    """27B: by width over heads, which no key says and which is not the width of a head."""
    metadata = _metadata(
        architecture, block_count=layers, attention__key_length=32, attention__value_length=32
    )
    assert gguf_config.to_config(metadata, _shapes(layers=layers)).query_scale == 128**-0.5


def test_yarn_keys():
    scaling = {"type": "yarn", "factor": 8.0, "original_context_length": 16384, "attn_factor": 0.5}
    keys = {f"rope__scaling__{key}": value for key, value in scaling.items()}
    rope = gguf_config.to_config(_metadata("qwen3", **keys), _shapes()).rope
    assert (rope.kind, rope.factor, rope.original_max_seq_len) == ("yarn", 8.0, 16384)
    assert rope.attention_factor == pytest.approx(0.5 * (1 + 0.1 * math.log(8)))  # of ggml's rope_yarn


def test_names_of_gpt_oss():
    config = exportable.config("gpt_oss")
    assert tensor_name("layers.1.mlp_norm.weight", config) == "blk.1.post_attention_norm.weight"
    assert tensor_name("layers.1.attention.sinks", config) == "blk.1.attn_sinks.weight"
    assert tensor_name("layers.1.moe.router.bias", config) == "blk.1.ffn_gate_inp.bias"
