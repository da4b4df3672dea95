"""Models that hold the same."""

import jax
import numpy as np

from jaxopt_llm.models import Transformer, weights


def assert_same(model: Transformer, other: Transformer) -> None:
    """The same codes, scales and floats, bit for bit."""
    assert model.config == other.config
    values, others = weights(model), weights(other)
    assert values.keys() == others.keys()
    for name in values:
        assert jax.tree.structure(values[name]) == jax.tree.structure(others[name]), name
        leaves, other_leaves = jax.tree.leaves(values[name]), jax.tree.leaves(others[name])
        for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
            assert leaf.dtype == other_leaf.dtype, name
            np.testing.assert_array_equal(leaf, other_leaf, err_msg=name)
