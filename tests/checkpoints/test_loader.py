"""Loading: whole or shard by shard, in any type, from any kind of checkpoint."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxopt_llm as jo
from jaxopt_llm import checkpoints, models
from jaxopt_llm.checkpoints import CheckpointError
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import Transformer, weights
from jaxopt_llm.models.families import parse_config
from tests import families
from tests.checkpoints.same import assert_same

# Groups of 32 divide every width, and their numbers the four shards; two KV heads stay whole on each.
WIDE = families.LLAMA | {
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
PARTS = {  # by which `tensor=4` cuts (rows, columns)
    r"attention\.(k|v)\.weight": (1, 1),
    r"(q|gate|up|embed|head)\.weight": (4, 1),
    r"(o|down)\.weight": (1, 4),
}


def export(directory, **changes):
    """A model with random weights, as a Hugging Face directory."""
    model = Transformer(parse_config(WIDE | changes), rngs=nnx.Rngs(0))
    checkpoints.export_hf(model, None, directory)
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return export(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def stories(data_dir):
    return data_dir / "stories260K.gguf"


@pytest.mark.parametrize("quantize", [None, "int8", "int8_block", "int3_g32_zero"])
def test_each_device_holds_its_part_of_the_whole(wide, quantize):
    whole, _ = jo.load(wide, quantize=quantize)
    placed, _ = jo.load(wide, quantize=quantize, mesh="data=2,tensor=4")
    assert_same(placed, whole)
    for name, value in weights(placed).items():
        parts = next((parts for pattern, parts in PARTS.items() if re.search(pattern, name)), (1,))
        for leaf in jax.tree.leaves(value):
            one_scale_a_row = leaf.ndim == 2 and leaf.shape[1] == 1
            shape = tuple(np.array(leaf.shape) // ((parts[0], 1) if one_scale_a_row else parts))
            assert [shard.data.shape for shard in leaf.addressable_shards] == [shape] * 8, name


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mixtral", "data=2,expert=2,tensor=2"),  # one tensor an expert, two files
        ("gpt_oss", "expert=4,tensor=2"),  # gate and up interleaved in one tensor, transposed
        ("gpt_oss_mxfp4", "expert=2,tensor=4"),
        ("llama_bias", "tensor=2"),
    ],
)
def test_sharded_families(tmp_path, name, mesh):
    families.write(name, tmp_path)
    assert_same(jo.load(tmp_path, mesh=mesh)[0], jo.load(tmp_path)[0])


@pytest.mark.parametrize("options", [{}, {"dtype": "native"}, {"quantize": "int8"}])
def test_sharded_gguf(stories, wide, tmp_path, options):
    """Rows of queries and keys are put in order before they are cut; blocks stay whole."""
    model, _ = jo.load(wide, quantize="int8_block")
    checkpoints.export_gguf(model, None, tmp_path / "q8_0.gguf", dtype="Q8_0")
    for path in (stories, tmp_path / "q8_0.gguf"):
        assert_same(jo.load(path, mesh="tensor=4", **options)[0], jo.load(path, **options)[0])


@pytest.mark.parametrize("quantize", [None, "int8_block", "int3_g32_zero"])
def test_a_sharded_model_gives_the_same_logits(wide, quantize):
    forward = nnx.jit(lambda model, tokens: model(tokens))
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, WIDE["vocab_size"])
    whole = forward(jo.load(wide, quantize=quantize)[0], tokens)
    placed = forward(jo.load(wide, quantize=quantize, mesh="data=2,tensor=4")[0], tokens)
    assert families.relative_error(placed, np.asarray(whole)) < 1e-5


def test_a_group_that_would_straddle_two_shards_is_refused(tmp_path):
    directory = export(tmp_path / "model", intermediate_size=96)
    jo.load(directory, quantize="int8", mesh="tensor=4")
    assert models.mesh_of(jo.load(directory, quantize="int8", mesh="auto")[0]).shape["tensor"] == 4
    with pytest.raises(
        ValueError, match=r"mlp\.down\.weight has 3 groups of 32, which mesh tensor=4 does not"
    ):
        jo.load(directory, quantize="int8_block", mesh="tensor=4")


@pytest.mark.parametrize("quantize", ["int8", "int8_block"])
def test_rounding_while_reading_is_rounding_afterwards(wide, quantize):
    """NumPy rounds on the host, XLA on the device: scales may differ in their last bit, and a code with them."""
    values = weights(jo.load(wide, quantize=quantize)[0])
    expected = weights(jo.quantize(jo.load(wide)[0], quantize))
    for name, value in expected.items():
        assert jax.tree.structure(values[name]) == jax.tree.structure(value)
        if isinstance(value, QArray):
            np.testing.assert_allclose(values[name].scale, value.scale, rtol=2e-7)
            off = np.abs(values[name].codes() - value.codes())
            assert off.max() <= 1
            assert off.mean() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.float32])
def test_dtype(wide, dtype):
    model, tokenizer = jo.load(wide, dtype=dtype)
    assert tokenizer is None  # there is none in the directory
    assert model.dtype == dtype
    stored = load_file(wide / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(model.layers[1].mlp.up.weight.get_value(), stored.astype(jnp.dtype(dtype)))


def test_native_keeps_the_blocks_of_a_gguf_file(wide, tmp_path):
    model, _ = jo.load(wide, quantize="int8_block")
    checkpoints.export_gguf(model, None, tmp_path / "m.gguf", dtype="Q8_0")
    native, _ = jo.load(tmp_path / "m.gguf", dtype="native")
    values, expected = weights(native), weights(model)
    for name, value in expected.items():
        if isinstance(value, QArray):
            np.testing.assert_array_equal(values[name].data, value.data)
            np.testing.assert_array_equal(values[name].scale, value.scale)


def test_a_tied_checkpoint_may_repeat_the_embedding(tmp_path):
    directory = export(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    expected, _ = jo.load(directory)
    save_file(tensors, directory / "model.safetensors")
    assert_same(jo.load(directory)[0], expected)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path, dtype):
    """transformers 4 drops that head, 5 uses it; one value in the last row is enough."""
    directory = export(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].astype(dtype)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"true, but 'lm_head.weight' is not 'model\.embed"):
        jo.load(directory)
    save_file(tensors | {"lm_head.weight": head[:-1]}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true"):
        jo.load(directory)


def test_the_tower_of_a_multimodal_checkpoint_is_skipped_and_named(tmp_path):
    families.write("gemma3", tmp_path)
    with pytest.warns(
        UserWarning, match="loaded the text model, skipped multi_modal_projector, vision_tower"
    ):
        jo.load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_stored_frequencies_of_the_rope_are_dropped_without_a_word(tmp_path, name):
    """They repeat what the config says; a warning would fail this test."""
    families.write(name, tmp_path)
    expected, _ = jo.load(tmp_path)
    tensors = families.weights(name) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(jo.load(tmp_path)[0], expected)


def test_an_untied_head_of_a_multimodal_checkpoint_is_read(tmp_path):
    families.write("gemma3", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    tensors = families.weights("gemma3")
    head = tensors["language_model.model.embed_tokens.weight"] * 2
    save_file(tensors | {"language_model.lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="skipped"):
        model, _ = jo.load(tmp_path)
    np.testing.assert_array_equal(model.head.weight.get_value(), head)


def test_progress_reaches_its_total(wide):
    seen = []
    model, _ = jo.load(wide, progress=lambda placed, total: seen.append((placed, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(value.size for value in weights(model).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' must be native, float32, bfloat16, float16, or None"),
        ({"dtype": "fp32"}, "dtype='fp32' must be"),
        ({"quantize": "int3"}, "unknown quantization 'int3'; known are int8, int8_block"),
        ({"dtype": "native", "quantize": "int8"}, "drop it, or drop quantize"),
        ({"mesh": "model=2"}, "unknown mesh axis 'model'"),
        ({"mesh": "tensor=16"}, "needs 16 devices and there are 8"),
        ({"mesh": "tensor=3"}, "does not divide heads=4"),
        ({"mesh": "stage=8"}, "stage=8 has more stages than the model layers"),
        ({"mesh": "expert=2"}, "expert=2 would split nothing: the model has no experts"),
    ],
)
def test_options_that_cannot_be(wide, options, message):
    with pytest.raises(ValueError, match=message):
        jo.load(wide, **options)


def test_config_and_stored_bytes_without_weights(wide, stories, tmp_path):
    model, _ = jo.load(wide, quantize="int8_block")
    jo.save(model, None, tmp_path / "ours")
    for path, kinds in (
        (wide, {"F32"}),
        (tmp_path / "ours", {"int8", "float16", "float32"}),
        (stories, {"F32"}),
    ):
        config, resolved = checkpoints.read_config(path)
        assert (resolved, config) == (path, jo.load(path)[0].config)
        assert checkpoints.stored_bytes(path).keys() == kinds
    assert sum(checkpoints.stored_bytes(tmp_path / "ours").values()) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(weights(model))
    )
    (wide.parent / "bare").mkdir()
    (wide.parent / "bare" / "config.json").write_text((wide / "config.json").read_text())
    assert checkpoints.stored_bytes(wide.parent / "bare") == {}
