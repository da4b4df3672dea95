"""Pruned models: what the whole model computes with the other parts set to zero, whatever the family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.checkpoints import export_gguf, export_hf
from jaxopt_llm.models import from_params, num_params, weights
from jaxopt_llm.models.layers import Norm
from jaxopt_llm.prune import Kept, cut
from tests import exportable
from tests.cuts import kept_of

TOKENS = np.arange(48).reshape(2, 24) * 7 % 90


@functools.cache
def model(name):
    return exportable.model(name)


def masked(whole, kept):
    """The whole model with zeros for what goes; its norms take the mean over what stays."""
    config, offset = whole.config, whole.config.norm_offset
    gone = np.setdiff1d(np.arange(config.d_model), kept.embed)
    values = {name: np.array(value) for name, value in weights(whole).items()}
    values["embed.weight"][:, gone] = 0
    place = {layer: i for i, layer in enumerate(kept.layers)}
    for name, value in values.items():
        if name.endswith("norm.weight") and ".attention." not in name:
            value[gone] = -offset
        if not name.startswith("layers."):
            continue
        layer, part, leaf = int(name.split(".")[1]), name.split(".")[-2], name.split(".")[-1]
        writes = part in ("o", "down")
        if writes and (layer not in place or leaf == "bias"):
            value[..., gone if layer in place else slice(None)] = 0
        elif writes:
            value[..., gone, :] = 0
            if part == "o":
                heads = np.setdiff1d(np.arange(config.num_heads), kept.heads[place[layer]])
                value.reshape(config.d_model, config.num_heads, -1)[:, heads] = 0
            elif kept.mlp is not None:
                value[:, np.setdiff1d(np.arange(config.d_ff), kept.mlp[place[layer]])] = 0
        elif part in ("q", "k") and layer in place and config.qk_norm == "width":
            group = 1 if part == "q" else config.num_heads // config.num_kv_heads
            stay = np.unique(np.array(kept.heads[place[layer]]) // group)
            per_head = value.reshape(config.num_heads // group, config.head_dim, -1)
            per_head[np.setdiff1d(np.arange(len(per_head)), stay)] = 0
    result = from_params(config, {name: jnp.asarray(value) for name, value in values.items()})
    for path, norm in nnx.iter_modules(result):
        if isinstance(norm, Norm) and "attention" not in path:
            norm.width = len(kept.embed)
        elif isinstance(norm, Norm) and config.qk_norm == "width":
            queries = len(kept.heads[0]), config.num_heads
            groups = len({head // (config.num_heads // config.num_kv_heads) for head in kept.heads[0]})
            stay, of = queries if path[-1] == "q_norm" else (groups, config.num_kv_heads)
            norm.width = norm.width * stay // of
    return result


def logits(model):
    graph, params = nnx.split(model)
    return jax.jit(functools.partial(jo.apply, graph))(params, TOKENS)


CUT = ["llama_bias", "llama_llama3", "qwen3", "mixtral", "gemma3_text", "olmo2"]


@pytest.mark.parametrize("name", CUT)
def test_the_pruned_model_is_the_masked_one(name):
    whole = model(name)
    kept = kept_of(whole.config)
    pruned = cut(whole, kept)
    assert num_params(pruned) < num_params(whole)
    np.testing.assert_allclose(logits(pruned), logits(masked(whole, kept)), atol=1e-4)


def assert_same(again, pruned):
    assert again.config == pruned.config
    for parameter, value in weights(pruned).items():
        np.testing.assert_array_equal(weights(again)[parameter], value, err_msg=parameter)


@pytest.mark.parametrize("name", CUT)
def test_a_hugging_face_directory_holds_the_same_model(name, tmp_path):
    pruned = cut(model(name), kept_of(model(name).config))
    export_hf(pruned, None, tmp_path / "hf")
    assert_same(jo.load(tmp_path / "hf")[0], pruned)


@pytest.mark.parametrize("name", ["llama_bias", "qwen3"])
def test_a_gguf_file_holds_the_same_model(name, tmp_path):
    pruned = cut(model(name), kept_of(model(name).config))
    export_gguf(pruned, None, tmp_path / "model.gguf", dtype="F32")
    assert_same(jo.load(tmp_path / "model.gguf")[0], pruned)


def test_nothing_said_nothing_cut():
    whole = model("qwen3")
    same = cut(whole, Kept())
    assert same.config == whole.config
    for name, value in weights(whole).items():
        assert weights(same)[name] is value, name


def test_sinks_go_with_their_heads():
    whole = model("gpt_oss")
    heads = [[1, 2]] * whole.config.num_layers  # one of each group of two
    pruned = weights(cut(whole, Kept(heads=heads)))
    np.testing.assert_array_equal(
        pruned["layers.1.attention.sinks"], weights(whole)["layers.1.attention.sinks"][np.array([1, 2])]
    )


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("qwen3", Kept(layers=[]), "layers: nothing would be left; keep at least one of"),
        ("qwen3", Kept(embed=[0, 99]), "must be ascending indices below 48"),
        ("qwen3", Kept(embed=[3, 1]), "must be ascending"),
        ("qwen3", Kept(layers=[0], heads=[[0]] * 2), "heads has entries for 2 layers; 1 stay"),
        ("qwen3", Kept(layers=[0], heads=[[0, 1, 2]]), r"leave key/value groups of \[1, 2\] query heads"),
        ("qwen3", Kept(layers=[0, 1], mlp=[[0], [1, 2]]), r"mlp: layers keep \[1, 2\]"),
        ("mixtral", Kept(layers=[0], mlp=[[0]]), "mixtral has experts, whose channels are not cut"),
    ],
)
def test_what_cannot_be_cut_is_refused(name, kept, message):
    with pytest.raises(ValueError, match=message):
        cut(model(name), kept)


def test_quantized_weights_are_refused():
    with pytest.raises(ValueError, match=r"embed\.weight is quantized; prune the float model"):
        cut(jo.quantize(model("qwen3"), "int8"), Kept())
