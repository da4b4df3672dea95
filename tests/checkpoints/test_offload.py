"""Parameters on disk are those in memory, and take no room there that a user would have to clear."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import Offload
from jaxopt_llm.kernels import quantization_format
from tests import exportable


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = exportable.model("qwen2")
    jo.save(model, None, folder / "own")
    checkpoints.export_hf(model, None, folder / "hf")
    return folder


@pytest.mark.parametrize("form", ["own", "hf"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=str)
def test_a_model_on_disk_is_the_model(saved, tmp_path, form, options):
    model, _ = jo.load(saved / form, **options)
    offloaded, _ = jo.load(saved / form, offload=tmp_path, **options)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (offloaded, model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not any(tmp_path.iterdir())


def test_a_quantized_weight_is_kept(tmp_path):
    weight = quantization_format("int4").quantize(jnp.arange(256.0).reshape(4, 64))
    kept = Offload(tmp_path).keep(weight)
    assert jax.tree.structure(kept) == jax.tree.structure(weight)
    jax.tree.map(np.testing.assert_array_equal, kept, weight)


def test_what_lies_on_several_devices_stays_there(tmp_path):
    mesh = jax.make_mesh((2,), ("tensor",))
    array = jax.device_put(jnp.arange(4), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor")))
    assert Offload(tmp_path).keep([array])[0] is array


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 4 MB of parameters; free some") as caught:
        Offload(tmp_path).array((1000, 1000), np.float32)
    assert caught.value.filename == str(tmp_path)


def test_no_mesh(saved, tmp_path):
    with pytest.raises(ValueError, match="offload maps parameters into a CPU's memory; drop it"):
        jo.load(saved / "hf", offload=tmp_path, mesh="tensor=2")
