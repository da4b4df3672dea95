"""GGUF files out of models: what is in them, that they give the model back, and what is refused."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import gguf as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints.gguf_config import ARCHITECTURES
from jaxopt_llm.checkpoints.gguf_export import export, metadata
from jaxopt_llm.kernels import FORMATS, QArray
from jaxopt_llm.models import from_params, quantizable, weights
from jaxopt_llm.models.families import parse_config
from jaxopt_llm.prune import cut
from tests import exportable, families
from tests.cuts import kept_of

ROOT = Path(__file__).parents[2]
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


@pytest.mark.parametrize("name", exportable.CHANGES)
def test_float32_gives_the_model_back(name, tmp_path):
    model = exportable.model(name)
    export(model, None, tmp_path / "model.gguf", dtype="F32")
    loaded, tokenizer = checkpoints.load(tmp_path / "model.gguf", dtype="float32")
    assert tokenizer is None
    if name == "mistral":  # in llama.cpp a llama
        assert loaded.config.family == "llama"
    else:
        assert loaded.config == model.config
    for part, expected in weights(model).items():
        offset = model.config.norm_offset and part.endswith("norm.weight")  # added, and taken away again
        np.testing.assert_allclose(
            weights(loaded)[part], expected, rtol=0, atol=2e-7 if offset else 0, err_msg=part
        )


def test_float16_rounds_to_nearest(tmp_path):
    model = exportable.model("qwen3_moe", **exportable.WIDE)
    export(model, None, tmp_path / "model.gguf", dtype="F16")
    loaded = weights(checkpoints.load(tmp_path / "model.gguf", dtype="float32")[0])
    for name, expected in weights(model).items():
        exact = (
            expected.astype(jnp.float16).astype(jnp.float32)
            if quantizable(name, expected.shape)
            else expected
        )
        np.testing.assert_array_equal(loaded[name], exact, err_msg=name)


def test_q8_0_rounds_to_nearest(tmp_path):
    """Half a step in every group of 32, and a sixteenth for the scale that is itself rounded to float16."""
    model = exportable.model("qwen3_moe", **exportable.WIDE)
    export(model, None, tmp_path / "model.gguf", dtype="Q8_0")
    loaded = weights(checkpoints.load(tmp_path / "model.gguf", dtype="float32")[0])
    for name, expected in weights(model).items():
        groups = np.asarray(expected).reshape(-1, 32 if quantizable(name, expected.shape) else 1)
        errors = np.abs(np.asarray(loaded[name]).reshape(groups.shape) - groups).max(-1)
        steps = np.abs(groups).max(-1) / 127 if groups.shape[-1] == 32 else 0
        assert (errors <= (1 / 2 + 1 / 16) * steps).all(), name


def test_logits_survive(tmp_path):
    model = exportable.model("gpt_oss", **exportable.WIDE)
    export(model, None, tmp_path / "model.gguf", dtype="F16")
    loaded, _ = checkpoints.load(tmp_path / "model.gguf", dtype="float32")
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, 12))
    forward = nnx.jit(lambda model, tokens: model(tokens))
    assert families.relative_error(forward(loaded, tokens), forward(model, tokens)) < 5e-3


@pytest.mark.parametrize("name", exportable.CHANGES)
def test_the_reference_reader_finds_what_it_knows(name, tmp_path):
    """The `gguf` package: every name is one of the architecture's, every shape the model's, reversed."""
    model = exportable.model(name)
    export(model, None, tmp_path / "model.gguf", dtype="Q8_0")
    reader = reference.GGUFReader(tmp_path / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    code = {value: key for key, value in reference.MODEL_ARCH_NAMES.items()}[architecture]
    known = {reference.TENSOR_NAMES[tensor] for tensor in reference.MODEL_TENSORS[code]}
    for tensor in reader.tensors:
        stem = tensor.name.rsplit(".", 1)[0]
        layer = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{layer}.", "blk.{bid}.") in known, tensor.name
    shapes = sorted(
        tuple(tensor.shape.tolist()) for tensor in reader.tensors if tensor.name != "rope_freqs.weight"
    )
    assert shapes == sorted(weight.shape[::-1] for weight in weights(model).values())
    assert reader.fields[f"{architecture}.block_count"].contents() == model.config.num_layers


@pytest.mark.parametrize("dtype", FILE_TYPES)
def test_types_of_tensors(dtype, tmp_path):
    """Matrices as asked, F16 where 32 does not divide their rows; the rest float32, as llama.cpp wants it."""
    model = exportable.model("gpt_oss")
    export(model, None, tmp_path / "model.gguf", dtype=dtype)
    reader = reference.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPES[dtype]
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_output.weight"] == dtype  # rows of 128
    assert types["blk.0.attn_q.weight"] == ("F16" if dtype == "Q8_0" else dtype)  # rows of 40
    for name in ("attn_norm.weight", "attn_q.bias", "attn_sinks.weight", "ffn_gate_inp.weight"):
        assert types[f"blk.0.{name}"] == "F32"


def test_llama_rows_are_permuted_as_the_converter_does(tmp_path):
    """llama.cpp's `LlamaModel.permute`: heads of two halves become heads of pairs, biases too."""
    model = exportable.model("llama_bias")
    export(model, None, tmp_path / "model.gguf", dtype="F32")
    tensors = {tensor.name: tensor.data for tensor in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    heads = {"q": model.config.num_heads, "k": model.config.num_kv_heads}
    for letter, leaf in (("q", "weight"), ("k", "weight"), ("q", "bias"), ("k", "bias")):
        ours = np.asarray(weights(model)[f"layers.1.attention.{letter}.{leaf}"])
        halves = ours.reshape(heads[letter], 2, model.config.head_dim // 2, *ours.shape[1:])
        expected = halves.swapaxes(1, 2).reshape(ours.shape)
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{letter}.{leaf}"], expected)


def test_gemma_norms_hold_the_whole_gain(tmp_path):
    model = exportable.model("gemma3_text")
    export(model, None, tmp_path / "model.gguf", dtype="F16")
    tensors = {tensor.name: tensor.data for tensor in reference.GGUFReader(tmp_path / "model.gguf").tensors}
    for ours, theirs in (("layers.2.attention.q_norm", "blk.2.attn_q_norm"), ("final_norm", "output_norm")):
        np.testing.assert_array_equal(tensors[f"{theirs}.weight"], 1 + weights(model)[f"{ours}.weight"])


def test_int8_blocks_pass_through(tmp_path):
    """Q8_0 is `int8_block`: codes and scales come back bit by bit, those of permuted rows too."""
    model = exportable.model("llama", **exportable.WIDE)
    rounded = {
        name: FORMATS["int8_block"].quantize(weight) if quantizable(name, weight.shape) else weight
        for name, weight in weights(model).items()
    }
    export(from_params(model.config, rounded), None, tmp_path / "model.gguf", dtype="Q8_0")
    loaded = weights(checkpoints.load(tmp_path / "model.gguf", dtype="native")[0])
    for name, expected in rounded.items():
        if isinstance(expected, QArray):
            assert loaded[name].scale.dtype == jnp.float16
            jax.tree.map(np.testing.assert_array_equal, loaded[name].scale, expected.scale)
            np.testing.assert_array_equal(loaded[name].data, expected.data, err_msg=name)


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_other_quantized_weights_go_by_their_values(dtype, tmp_path):
    model = exportable.model("llama", **exportable.WIDE)
    rounded = weights(model) | {"head.weight": FORMATS["int8"].quantize(weights(model)["head.weight"])}
    export(from_params(model.config, rounded), None, tmp_path / "model.gguf", dtype=dtype)
    loaded = weights(checkpoints.load(tmp_path / "model.gguf", dtype="float32")[0])["head.weight"]
    expected = rounded["head.weight"].dequantize()
    atol = np.abs(expected).max() / 254 if dtype == "Q8_0" else 0
    np.testing.assert_allclose(loaded, expected, rtol=0, atol=atol)


REFUSED = {
    "mistral": "llama models cannot have windows=",
    "qwen2_window": "qwen2 models cannot have windows=",
    "qwen3_yarn": "qwen3 models cannot have rope=",
    "qwen3_moe": "qwen3moe models cannot have experts=",
    "gemma2": "gemma2 models cannot have query_scale=",
    "gpt_oss": "gpt-oss models cannot have swiglu_limit=2.0, rope=",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, message, tmp_path):
    families.write(name, tmp_path / "hf")
    model, _ = checkpoints.load(tmp_path / "hf", dtype="float32")
    with pytest.raises(ValueError, match=message):
        export(model, None, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


PUBLISHED = [
    "Llama-3.2-1B-Instruct",
    "Mistral-7B-Instruct-v0.3",
    "OLMo-2-0425-1B",
    "Qwen2.5-0.5B-Instruct",
    "Qwen3-0.6B",
    "gemma-2-2b",
    "gemma-3-1b-it",
    "gpt-oss-20b",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_can_be_written(name, shared):
    config = parse_config(json.loads((shared / "model-configs" / name / "config.json").read_text()))
    assert metadata(config)["general.architecture"] == ARCHITECTURES[config.family]


def test_biases_that_llama_cpp_does_not_read_are_refused(tmp_path):
    config = exportable.config("qwen3", attention_bias=True)
    model = jo.models.Transformer(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"qwen3 models cannot have qkv_bias=True, o_bias=True"):
        export(model, None, tmp_path / "model.gguf")


def test_windows_wider_than_the_context_are_none(tmp_path):
    config = exportable.config("mistral", sliding_window=128)
    model = from_params(config, weights(exportable.model("mistral")))
    export(model, None, tmp_path / "model.gguf")
    assert checkpoints.read_config(tmp_path / "model.gguf")[0].windows == (None,) * 4


def test_layers_may_slide_in_another_order(tmp_path):
    """As in a Gemma that lost a layer: llama.cpp reads which of the rest slide."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"] * 2
    config = exportable.config("gemma3_text", layer_types=kinds)
    model = from_params(config, weights(exportable.model("gemma3_text")))
    export(model, None, tmp_path / "model.gguf")
    assert checkpoints.read_config(tmp_path / "model.gguf")[0] == config


def test_tokenizer_and_text_survive(data_dir, tmp_path):
    model, tokenizer = jo.load(data_dir / "stories260K.gguf", dtype="float32")
    export(model, tokenizer, tmp_path / "model.gguf", dtype="F32")
    again, its_tokenizer = jo.load(tmp_path / "model.gguf", dtype="float32")
    assert again.config == model.config
    text = "One day, she saw a big, red ball. <s>"
    assert its_tokenizer.encode(text) == tokenizer.encode(text)
    jax.tree.map(np.testing.assert_array_equal, weights(again), weights(model))


def test_rows_of_the_embedding_without_a_token_get_one(data_dir, tmp_path):
    """llama.cpp wants as many tokens as rows; models are often padded."""
    _, tokenizer = jo.load(data_dir / "stories260K.gguf")
    config = exportable.config("llama", vocab_size=520)
    export(jo.models.Transformer(config, rngs=nnx.Rngs(0)), tokenizer, tmp_path / "model.gguf")
    fields = reference.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[512:] == [f"[PAD{i}]" for i in range(512, 520)]
    for key in ("scores", "token_type"):
        assert len(fields[f"tokenizer.ggml.{key}"].contents()) == 520
    with pytest.raises(ValueError, match="512 tokens but the embedding only 101 rows"):
        export(exportable.model("llama"), tokenizer, tmp_path / "small.gguf")


def test_special_tokens_without_a_row_are_left_out(data_dir, tmp_path):
    """Gemma 3's tokenizer has one for images, which its text models cannot embed."""
    model, tokenizer = jo.load(data_dir / "stories260K.gguf", dtype="float32")
    tokenizer.backend.add_special_tokens(["<image>"])
    with pytest.warns(UserWarning, match="left out 1 special tokens beyond the embedding's 512 rows"):
        export(model, tokenizer, tmp_path / "model.gguf")
    _, loaded = jo.load(tmp_path / "model.gguf")
    assert (tokenizer.backend.token_to_id("<image>"), loaded.vocab_size) == (512, 512)


def test_an_error_leaves_the_old_file(tmp_path):
    model = exportable.model("llama")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    huge = weights(model) | {"layers.2.mlp.up.weight": jnp.full((88, 48), 1e6)}
    with pytest.raises(ValueError, match=r"blk.2.ffn_up.weight.* cannot be written as F16"):
        export(from_params(model.config, huge), None, target, dtype="F16")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype='Q4_K' is unknown; known are F32, F16, Q8_0"):
        export(exportable.model("llama"), None, tmp_path / "model.gguf", dtype="Q4_K")


@pytest.mark.verify
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", exportable.CHANGES)
def test_llama_cpp_computes_the_same_logits(name, pruned, tmp_path):
    """The environment variable JAXOPT_PEER names an interpreter with llama-cpp-python."""
    if "JAXOPT_PEER" not in os.environ:
        pytest.skip("set JAXOPT_PEER to a Python that has llama-cpp-python")
    model = exportable.model(name)
    if pruned:
        kept = kept_of(model.config)
        if name in ("qwen2", "olmo2"):  # there a head is as wide as the model's width allows, and no other
            kept = dataclasses.replace(kept, embed=None, heads=None)
        model = cut(model, kept)
    export(model, None, tmp_path / "model.gguf", dtype="F32")
    prompt = np.random.default_rng(1).integers(model.config.vocab_size, size=20).tolist()
    script = ROOT / "benchmarks" / "llama_cpp_greedy.py"
    command = [os.environ["JAXOPT_PEER"], script, tmp_path / "model.gguf", tmp_path / "out.npz", "40"]
    subprocess.run(command, input=json.dumps([prompt]), text=True, check=True)
    if name == "gpt_oss":  # llama.cpp rounds yarn's borders, where the model was trained without
        rope = dataclasses.replace(model.config.rope, truncate=True)
        model = from_params(dataclasses.replace(model.config, rope=rope), weights(model))
    with np.load(tmp_path / "out.npz") as theirs:
        tokens = jnp.asarray([[*prompt, *theirs["tokens_0"][:-1].tolist()]])
        ours = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)[0, len(prompt) - 1 :]
        gelu = name.startswith("gemma")  # from a table in float16
        assert families.relative_error(ours, theirs["logits_0"]) < (2e-3 if gelu else 1e-5)
