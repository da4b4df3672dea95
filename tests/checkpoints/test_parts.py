"""Weights that a long job has finished come back as they were, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.checkpoints import CheckpointError, read_weights, write_weights
from jaxopt_llm.kernels import FORMATS

FLOATS = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


def test_weights_of_every_kind_come_back(tmp_path):
    weights = {name: form.quantize(jnp.asarray(FLOATS)) for name, form in FORMATS.items()}
    weights |= {"plain": jnp.asarray(FLOATS), "a.b": jnp.asarray(FLOATS[0], jnp.bfloat16)}
    write_weights(tmp_path / "some.safetensors", weights)
    found = read_weights(tmp_path / "some.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(weights)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(weights), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "some.safetensors"
    write_weights(path, {"plain": jnp.asarray(FLOATS)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_weights(path)
