"""Devices that are not there: found without a trace, or refused in one line."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from jaxopt_llm.sharding import MeshSpec, topologies


def test_a_mesh_to_compile_for():
    before = dict(os.environ)
    mesh = MeshSpec(data=2, tensor=2).build(topologies.tpu("v5e", "2x2"))
    assert dict(os.environ) == before
    assert jax.default_backend() == "cpu"
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=split)
    assert "all-reduce" in jax.jit(lambda x: x.sum()).lower(x).compile().as_text()


@pytest.mark.parametrize(("version", "layout"), [("v9", "2x2"), ("v5e", "3x1"), ("v5e", "many")])
def test_a_slice_that_does_not_exist(version, layout):
    with pytest.raises(ValueError, match=f"there is no TPU slice {version}:{layout}: [^\n]*$"):
        topologies.tpu(version, layout)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxopt-llm\[tpu-aot\]'"):
        topologies.tpu("v5e")


def test_a_gpu_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt"):
        topologies.gpu("h100")


@pytest.mark.parametrize("name", ["l4", "h101"])
def test_a_gpu_that_the_compiler_does_not_describe(name, monkeypatch, tmp_path):
    """`verify/test_gpu_ahead.py` has one that it does describe."""
    library = tmp_path / "plugin.so"
    library.write_bytes(b'code\0device_description_str: "NVIDIA L40"\n\0code')
    monkeypatch.setattr(topologies, "_cuda_plugin", lambda: library)
    with pytest.raises(ValueError, match=f"plugin.so of this version describes no GPU {name}; try h100"):
        topologies.gpu(name)
