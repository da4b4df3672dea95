"""Our own format: what was saved comes back bit for bit, quantized or not, also onto a mesh."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.checkpoints import CheckpointError, orbax
from jaxopt_llm.models import Transformer, num_bytes, weights
from jaxopt_llm.models.families import parse_config
from tests import families
from tests.checkpoints.same import assert_same

# Groups of 32 divide every width, and their numbers the four shards.
CONFIG = parse_config(
    families.LLAMA
    | {
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 96,
    }
)
FORMATS = ["float", "int8", "int8_block", "w8a8", "fp8", "int3_g32_zero"]


@pytest.fixture(scope="module")
def models():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    return {"float": model} | {name: jo.quantize(model, name) for name in FORMATS[1:]}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        jo.save(model, None, folder / name)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(models, saved, name):
    model = models[name]
    restored, tokenizer = jo.load(saved / name)
    assert tokenizer is None
    assert (restored.config, restored.dtype) == (model.config, model.dtype)
    assert num_bytes(restored) == num_bytes(model)
    assert_same(restored, model)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    tokens = jnp.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(forward(restored, tokens), forward(model, tokens))


@pytest.mark.parametrize("name", FORMATS)
def test_restored_on_a_mesh(models, saved, name):
    restored, _ = jo.load(saved / name, mesh="data=2,tensor=4")
    assert_same(restored, models[name])
    down = restored.layers[0].mlp.down.weight.get_value()
    shards = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(down)]
    codes = (64, 12) if name.startswith("int3") else (64, 32)
    scales = {"float": 0, "int3_g32_zero": 2}.get(name, 1)
    assert shards == [codes] + [(64, 1)] * scales


def test_a_sharded_model_is_saved_whole(models, saved, tmp_path):
    jo.save(jo.load(saved / "int8", mesh="tensor=4")[0], None, tmp_path / "out")
    assert_same(jo.load(tmp_path / "out")[0], models["int8"])


def test_blocks_of_a_gguf_file_keep_their_biases(tmp_path):
    """Q4_1: four bits, unsigned, with a bias."""
    config = parse_config(
        families.LLAMA | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    )
    values = weights(Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    rows, columns = values["layers.0.mlp.up.weight"].shape
    scale, bias = rng.random((2, rows, columns // 32)).astype(np.float16)
    codes = rng.integers(0, 256, (rows, columns // 2)).astype(np.uint8)
    values["layers.0.mlp.up.weight"] = jo.QArray(*map(jnp.asarray, (codes, scale, bias)), bits=4)
    model = jo.from_params(config, values)
    jo.save(model, None, tmp_path / "out")
    assert_same(jo.load(tmp_path / "out")[0], model)


def test_the_tokenizer_comes_along(models, tmp_path, data_dir):
    _, tokenizer = jo.load(data_dir / "stories260K.gguf")
    jo.save(models["int8"], tokenizer, tmp_path / "out")
    _, restored = jo.load(tmp_path / "out")
    text = "Once upon a time, Zoë's <s> 🦊"
    assert restored.encode(text) == tokenizer.encode(text)
    assert restored.eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("name", ["float", "int8"])
def test_floats_may_change_their_dtype(models, saved, name):
    restored, _ = jo.load(saved / name, dtype="bfloat16")
    assert restored.dtype == jnp.bfloat16
    expected = models[name].final_norm.weight.get_value().astype(jnp.bfloat16)
    np.testing.assert_array_equal(restored.final_norm.weight.get_value(), expected)
    embedding = restored.embed.weight.get_value()
    assert (embedding.data.dtype == jnp.int8) if name == "int8" else (embedding.dtype == jnp.bfloat16)


def test_what_is_there_is_replaced_only_if_it_is_a_checkpoint(models, saved, tmp_path):
    shutil.copytree(saved / "float", tmp_path / "out")
    jo.save(models["int8"], None, tmp_path / "out")
    assert_same(jo.load(tmp_path / "out")[0], models["int8"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("...")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        jo.save(models["int8"], None, tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def drop(directory, field):
    path = directory / orbax.MARKER
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != field}))


def change(**fields):
    def damage(directory):
        path = directory / orbax.MARKER
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def change_config(**fields):
    return change(config=CONFIG.to_json() | fields)


def change_weight(**fields):
    def damage(directory):
        path = directory / orbax.MARKER
        description = json.loads(path.read_text())
        description["weights"]["embed.weight"] |= fields
        path.write_text(json.dumps(description))

    return damage


def truncate(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax abandons
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"params: cannot be restored: "),
        (lambda directory: shutil.rmtree(directory / "params"), r"params: cannot be restored: "),
        (change(version=2), r"jaxopt_llm.json: version 2; this release reads version 1"),
        (change(config={}), r"jaxopt_llm.json: damaged: .*missing"),
        (change(weights={"embed.weight": {}}), r"jaxopt_llm.json: damaged: "),
        (change(weights=None), r"jaxopt_llm.json: damaged: "),
        (change(dtype="int8"), r"jaxopt_llm.json: damaged: .*'int8' is no float"),
        (change(dtype="F32"), r"jaxopt_llm.json: damaged: "),
        (lambda directory: drop(directory, "dtype"), r"jaxopt_llm.json: damaged: KeyError\('dtype'\)"),
        (change_weight(bits=7), r"jaxopt_llm.json: damaged: "),
        (change_weight(act=[8, 33]), r"jaxopt_llm.json: damaged: "),
        (change_weight(act=[8]), r"jaxopt_llm.json: damaged: "),
        (change_weight(data=[[96, 64], "uint8"]), r"jaxopt_llm.json: damaged: .*do not fit"),
        (change_weight(scale=[[96, 1], "int32"]), r"jaxopt_llm.json: damaged: .*'int32' is no float"),
        (change_weight(scale=[[96, 3], "float32"]), r"jaxopt_llm.json: damaged: .*do not fit"),
        (change_weight(scale=[[], "float32"]), r"jaxopt_llm.json: damaged: "),
        (change_weight(data=[[96, 1.5], "int8"]), r"jaxopt_llm.json: damaged: .*no array has shape"),
        (change_config(rope=None), r"jaxopt_llm.json: damaged: .*rope=None must be of type"),
        (change_config(rope_local=""), r"jaxopt_llm.json: damaged: "),
        (change_config(norm_eps="x"), r"jaxopt_llm.json: damaged: .*norm_eps='x' must be of type float"),
        (lambda directory: (directory / orbax.MARKER).write_text("{"), r"jaxopt_llm.json: not JSON"),
    ],
)
def test_damage_is_named(saved, tmp_path, damage, message):
    shutil.copytree(saved / "int8", tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=message) as raised:
        jo.load(tmp_path / "copy")
    assert "\n" not in str(raised.value)
    gc.collect()  # what was abandoned tells of it now, not in another test


def test_a_config_of_another_shape_lists_every_weight(saved, tmp_path):
    shutil.copytree(saved / "int8", tmp_path / "copy")
    change(config=CONFIG.to_json() | {"d_ff": 64, "tied": True})(tmp_path / "copy")
    with pytest.raises(CheckpointError) as raised:
        jo.load(tmp_path / "copy")
    for part in ("unexpected head.weight (96, 64)", "layers.0.mlp.up.weight has shape (128, 64)"):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"dtype": "native"}, {"quantize": "int8"}])
def test_options_for_other_formats_are_refused(saved, options):
    with pytest.raises(ValueError, match="in our own format and loads as it was saved"):
        jo.load(saved / "float", **options)
