"""LoRA: merged weights equal float64 NumPy's; what an adapter leaves alone is shared; nothing is ignored in silence."""

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import CheckpointError
from jaxopt_llm.models import place, weights
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests import adapters, families

Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A llama of three layers: its directory and its model."""
    directory = tmp_path_factory.mktemp("base")
    families.write("llama", directory)
    return directory, jo.load(directory, dtype="float32")[0]


def pairs(model, *parts, rank=3, layers=None, seed=0):
    """LoRA of some projections in some layers."""
    rng, shapes = np.random.default_rng(seed), {name: w.shape for name, w in weights(model).items()}
    ours = {Q: "layers.{}.attention.q.weight", UP: "layers.{}.mlp.up.weight"}
    every = range(model.config.num_layers) if layers is None else layers
    made = {}
    for i in every:
        for part in parts:
            made |= adapters.lora(rng, part.format(i), *shapes[ours[part].format(i)], rank)
    return made


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def same(one, other):
    """Two models of the same parameters."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(other[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rs", [False, True])
def test_merged_weights(base, tmp_path, rs):
    """Ranks and alphas by pattern; the first pattern that fits counts, from a whole part of the name on."""
    directory, model = base
    tensors = pairs(model, Q) | pairs(model, UP, rank=5, seed=1)
    adapters.write(
        tmp_path,
        tensors,
        r=3,
        lora_alpha=6,
        use_rslora=rs,
        target_modules=["q_proj", "mlp.up_proj"],
        rank_pattern={"proj": 7, r"layers\.\d\.mlp\.up_proj": 5, "up_proj": 9},
        alpha_pattern={"layers.1.self_attn.q_proj": 2.5},
        lora_dropout=0.1,
    )
    merged = jo.load_adapter(tmp_path).merge(model)
    old, new = weights(model), weights(merged)
    for i in range(3):
        q, up = f"layers.{i}.attention.q.weight", f"layers.{i}.mlp.up.weight"
        alpha = 2.5 if i == 1 else 6
        close(new[q], adapters.merged(old[q], tensors, Q.format(i), alpha=alpha, rs=rs))
        close(new[up], adapters.merged(old[up], tensors, UP.format(i), alpha=6, rs=rs))
        assert not np.allclose(new[q], old[q], atol=1e-3)
    untouched = {name for name in old if not name.endswith(("attention.q.weight", "mlp.up.weight"))}
    assert all(new[name] is old[name] for name in untouched)
    same(jo.load(directory, dtype="float32", adapter=tmp_path)[0], merged)


def test_dora(base, tmp_path):
    directory, model = base
    tensors, rng = pairs(model, UP), np.random.default_rng(2)
    lengths = {UP.format(i): rng.uniform(0.5, 2, model.config.d_ff).astype(np.float32) for i in range(3)}
    named = {f"{module}.lora_magnitude_vector": value for module, value in lengths.items()}
    adapters.write(tmp_path, tensors | named, r=3, lora_alpha=6, target_modules=["up_proj"], use_dora=True)
    merged, _ = jo.load(directory, dtype="float32", adapter=tmp_path)
    for i in range(3):
        name, module = f"layers.{i}.mlp.up.weight", UP.format(i)
        expected = adapters.merged(
            weights(model)[name], tensors, module, alpha=6, magnitude=lengths[module].astype(np.float64)
        )
        close(weights(merged)[name], expected)
    same(jo.load_adapter(tmp_path).merge(model), merged)


@pytest.fixture(scope="module")
def ends(base, tmp_path_factory):
    """LoRA of the embedding, whose base lies beside it, and a head and norms trained whole."""
    _, model = base
    rng, (vocab, width) = np.random.default_rng(3), weights(model)["embed.weight"].shape
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {
        "model.embed_tokens.lora_embedding_A": draw(4, vocab),
        "model.embed_tokens.lora_embedding_B": draw(width, 4),
        "model.embed_tokens.base_layer.weight": draw(vocab, width),
        "lm_head.weight": draw(vocab, width),
        "model.norm.weight": draw(width),
    }
    norms = [
        f"model.layers.{i}.{name}_layernorm.weight" for i in range(3) for name in ("input", "post_attention")
    ]
    tensors |= {name: draw(width) for name in norms}
    path = tmp_path_factory.mktemp("ends")
    save = ["lm_head", "norm"]  # a module whose name ends so is saved
    return adapters.write(path, tensors, r=4, target_modules=["embed_tokens"], modules_to_save=save), tensors


@pytest.mark.parametrize("name", ["llama", "llama_llama3"])
def test_embedding_and_weights_trained_whole(ends, tmp_path, name):
    """Of a model with one table for both ends, too: the two part."""
    path, tensors = ends
    families.write(name, tmp_path)
    model, _ = jo.load(tmp_path, dtype="float32")
    merged = jo.load_adapter(path).merge(model)
    new = weights(merged)
    a, b = (tensors[f"model.embed_tokens.lora_embedding_{part}"].astype(np.float64) for part in "AB")
    close(new["embed.weight"], tensors["model.embed_tokens.base_layer.weight"] + 8 / 4 * (b @ a).T)
    np.testing.assert_array_equal(new["head.weight"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(new["final_norm.weight"], tensors["model.norm.weight"])
    assert not merged.config.tied
    same(jo.load(tmp_path, dtype="float32", adapter=path)[0], merged)


def test_a_head_of_its_own(tmp_path):
    """Where one table serves both ends and the adapter changes one, the other stays as it is."""
    families.write("llama_llama3", tmp_path / "base")
    model, _ = jo.load(tmp_path / "base", dtype="float32")
    assert model.config.tied
    vocab, width = weights(model)["embed.weight"].shape
    tensors = adapters.lora(np.random.default_rng(0), "lm_head", vocab, width, 2)
    adapters.write(tmp_path / "a", tensors, r=2, target_modules=["lm_head"])
    new = weights(jo.load_adapter(tmp_path / "a").merge(model))
    assert new["embed.weight"] is weights(model)["embed.weight"]
    close(new["head.weight"], adapters.merged(new["embed.weight"], tensors, "lm_head", alpha=8))


def test_experts(tmp_path):
    """One module an expert, as transformers 4 has them; of those left out, not one tensor is asked for."""
    families.write("mixtral", tmp_path / "base")
    model, _ = jo.load(tmp_path / "base", dtype="float32")
    old, count = weights(model), model.config.experts.count
    rng, module = np.random.default_rng(0), "model.layers.1.block_sparse_moe.experts.{}.w3"
    tensors = {}
    for e in range(count):
        tensors |= adapters.lora(rng, module.format(e), *old["layers.1.moe.up.weight"].shape[1:], 2 + e % 2)
    ranks = {rf"experts\.{e}\.w3": 3 for e in range(1, count, 2)}
    adapters.write(tmp_path / "a", tensors, r=2, target_modules=["w3"], rank_pattern=ranks)
    new = weights(jo.load_adapter(tmp_path / "a").merge(model))
    for e in range(count):
        expected = adapters.merged(old["layers.1.moe.up.weight"][e], tensors, module.format(e), alpha=8)
        close(new["layers.1.moe.up.weight"][e], expected)
    assert new["layers.0.moe.up.weight"] is old["layers.0.moe.up.weight"]
    same(
        jo.load(tmp_path / "base", dtype="float32", adapter=tmp_path / "a")[0],
        jo.load_adapter(tmp_path / "a").merge(model),
    )
    some = {name: tensor for name, tensor in tensors.items() if ".experts.1." not in name}
    adapters.write(tmp_path / "b", some, r=2, target_modules=["w3"], rank_pattern=ranks)
    with pytest.raises(CheckpointError, match=f"missing LoRA A of {module.format(1)}"):
        jo.load_adapter(tmp_path / "b").merge(model)


@pytest.mark.parametrize(
    "target",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": r".*\.[02]\.self_attn\.q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj", "o_proj", "mlp.gate_proj",
         "up_proj", "down_proj", "layers.1.self_attn.q_proj"]},
    ],
)  # fmt: skip
def test_which_modules(base, tmp_path, target):
    """Neither a tensor more nor a tensor less than the config asks for."""
    _, model = base
    adapters.write(tmp_path / "two", pairs(model, Q, layers=(0, 2)), r=3, **target)
    new = weights(jo.load_adapter(tmp_path / "two").merge(model))
    changed = [name for name, value in weights(model).items() if new[name] is not value]
    assert changed == ["layers.0.attention.q.weight", "layers.2.attention.q.weight"]
    for layers, message in (
        ((0,), "missing LoRA B of model.layers.2"),
        ((0, 1, 2), "unexpected tensor 'model.layers.1"),
    ):
        adapters.write(tmp_path / "else", pairs(model, Q, layers=layers), r=3, **target)
        with pytest.raises(CheckpointError, match=message):
            jo.load_adapter(tmp_path / "else").merge(model)


def test_all_problems_are_told_together(base, tmp_path):
    directory, model = base
    tensors = pairs(model, Q) | {
        "model.norm.weight": np.zeros(7, np.float32),
        "score.weight": np.zeros((2, 3)),
    }
    del tensors[f"{Q.format(0)}.lora_B.weight"], tensors[f"{Q.format(1)}.lora_A.weight"]
    tensors[f"{Q.format(2)}.lora_A.weight"] = np.zeros((3, 5), np.float32)
    adapters.write(
        tmp_path, tensors, r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["norm", "lm_head"]
    )
    with pytest.raises(CheckpointError) as error:
        jo.load(directory, adapter=tmp_path)
    width = weights(model)["embed.weight"].shape[1]
    norms = [
        f"missing model.layers.{i}.{name}_layernorm.weight"
        for i in range(3)
        for name in ("input", "post_attention")
    ]
    ups = [f"missing LoRA {part} of {UP.format(i)}" for i in range(3) for part in "AB"]
    assert sorted(error.value.problems) == sorted([
        f"LoRA A and B of {Q.format(2)} have shapes (3, 5) and (48, 3), of rank 3 for 48 x {width}",
        f"missing LoRA A of {Q.format(1)}",
        f"missing LoRA B of {Q.format(0)}",
        "missing lm_head.weight",
        f"model.norm.weight has shape (7,), the model wants ({width},)",
        "unexpected tensor 'score.weight'",
        *norms,
        *ups,
    ])  # fmt: skip
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", "must be 'LORA'"),
        ("bias", "lora_only", "must be 'none'"),
        ("init_lora_weights", "pissa_niter_16", "others change the model too"),
        ("r", 0, "must be a whole number above 0"),
        ("r", True, "must be a whole number above 0"),
        ("lora_alpha", "16", "must be a number"),
        ("use_rslora", "false", "must be true or false"),
        ("target_modules", "(", "must be a regular expression or a list of names"),
        ("rank_pattern", {"q_proj": -1}, "must be an object of ranks by regular expressions"),
        ("layers_to_transform", ["1"], "must be a layer or a list of them"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "is a setting that no code reads"),
        ("trainable_token_indices", [5], "is a setting that no code reads"),
        ("lora_bias", True, "is a setting that no code reads"),
        ("layer_replication", [[0, 2]], "is a setting that no code reads"),
        ("alora_invocation_tokens", [1, 2], "is a setting that no code reads"),
        ("ensure_weight_tying", True, "is a setting that no code reads"),
        ("invented_tomorrow", "x", "is a setting that no code reads"),
    ],
)
def test_settings_that_cannot_be_merged(tmp_path, key, value, message):
    adapters.write(tmp_path, {"a.lora_A.weight": np.zeros((1, 1), np.float32)}, **{key: value})
    with pytest.raises(CheckpointError) as error:
        jo.load_adapter(tmp_path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{key}={value!r} ")
    assert message in problem


def test_settings_that_are_off_or_do_not_matter(tmp_path):
    off = {"lora_bias": False, "target_parameters": None, "layer_replication": [], "use_qalora": False}
    known = {
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "fan_in_fan_out": True,
        "revision": "main",
    }
    adapters.write(tmp_path, {"a.lora_A.weight": np.zeros((1, 1), np.float32)}, **off, **known)
    assert jo.load_adapter(tmp_path).config.r == 8


def test_files_that_are_no_adapter(base, tmp_path):
    directory, _ = base
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json in it: this is no adapter"):
        jo.load_adapter(directory)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors in it"):
        jo.load_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: a pickle can run any code"):
        jo.load_adapter(tmp_path)
    adapters.write(tmp_path, {"a.lora_A.weight": np.zeros((1, 1), np.int32)})
    with pytest.raises(CheckpointError, match="holds I32, no floats"):
        jo.load_adapter(tmp_path)


def test_rounding_comes_after_merging(base, tmp_path):
    """What is rounded already is not rounded again: an adapter may be less than half a step."""
    directory, model = base
    path = adapters.write(tmp_path / "a", pairs(model, UP), r=3, target_modules=["up_proj"])
    own = jo.load_adapter(path)
    once, _ = jo.load(directory, dtype="float32", quantize="int8", adapter=own)
    merged, rounded = (weights(m)["layers.1.mlp.up.weight"] for m in (own.merge(model), once))
    assert (np.abs(rounded.dequantize() - merged) <= rounded.scale * 0.501).all()
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.up\.weight is quantized, .*load\(\.\.\., adapter=, quantize=\)"
    ):
        own.merge(jo.quantize(model, "int8"))
    with pytest.raises(
        ValueError, match='dtype="native" keeps the file\'s own codes, and an adapter changes them'
    ):
        jo.load(directory, dtype="native", adapter=own)


def test_our_own_format_and_gguf(base, tmp_path):
    _, model = base
    own = jo.load_adapter(adapters.write(tmp_path / "a", pairs(model, Q), r=3, target_modules=["q_proj"]))
    checkpoints.save(model, None, tmp_path / "ours")
    same(jo.load(tmp_path / "ours", adapter=tmp_path / "a")[0], own.merge(model))
    checkpoints.export_gguf(model, None, tmp_path / "m.gguf")  # which interleaves the rows of q
    plain, _ = jo.load(tmp_path / "m.gguf", dtype="float32")
    same(jo.load(tmp_path / "m.gguf", dtype="float32", adapter=own)[0], own.merge(plain))


def test_on_a_mesh(base, tmp_path):
    """A merged weight lies as the one it replaces."""
    directory, model = base
    own = jo.load_adapter(
        adapters.write(tmp_path, pairs(model, Q, UP), r=3, target_modules=["q_proj", "up_proj"])
    )
    spread = place(model, Sharding(MeshSpec.parse("tensor=2").build(), model.config.units))
    merged = own.merge(spread)
    same(merged, own.merge(model))
    same(jo.load(directory, dtype="float32", mesh="tensor=2", adapter=own)[0], merged)
    for name, value in weights(merged).items():
        assert value.sharding == weights(spread)[name].sharding, name


def test_names_of_a_multimodal_model(tmp_path):
    """Its text model is what we have; a regular expression may speak of the whole."""
    families.write("gemma3", tmp_path / "base")
    model, _ = jo.load(tmp_path / "base", dtype="float32")
    shape = weights(model)["layers.0.attention.q.weight"].shape
    module = "model.language_model.layers.0.self_attn.q_proj"
    tensors = adapters.lora(np.random.default_rng(0), module, *shape, 2)
    adapters.write(tmp_path / "a", tensors, r=2, target_modules=r".*language_model\.layers\.0\..*q_proj")
    new = weights(jo.load_adapter(tmp_path / "a").merge(model))
    expected = adapters.merged(weights(model)["layers.0.attention.q.weight"], tensors, module, alpha=8)
    close(new["layers.0.attention.q.weight"], expected)


def test_halves(base, tmp_path):
    """The sum is made in float32 and rounded once, whatever the adapter and the model are stored in."""
    directory, model = base
    tensors = {name: tensor.astype(np.float16) for name, tensor in pairs(model, Q).items()}
    own = jo.load_adapter(adapters.write(tmp_path, tensors, r=3, target_modules=["q_proj"]))
    half, _ = jo.load(directory, dtype="bfloat16")
    new = weights(own.merge(half))["layers.0.attention.q.weight"]
    expected = adapters.merged(weights(half)["layers.0.attention.q.weight"], tensors, Q.format(0), alpha=8)
    assert new.dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(new.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


def test_dora_where_it_cannot_be(base, tmp_path):
    _, model = base
    shape = weights(model)["embed.weight"].shape
    tensors = {
        "model.embed_tokens.lora_embedding_A": np.ones((8, shape[0]), np.float32),
        "model.embed_tokens.lora_embedding_B": np.ones((shape[1], 8), np.float32),
        "model.embed_tokens.lora_magnitude_vector": np.ones(shape[1], np.float32),
    }
    adapters.write(tmp_path, tensors, target_modules=["embed_tokens"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"DoRA of model\.embed_tokens, .* cannot be merged"):
        jo.load_adapter(tmp_path).merge(model)
