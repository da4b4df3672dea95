"""Collectives that mean the same inside and outside a `shard_map`."""

import jax
from jaxtyping import Array, Float


def psum(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The sum over mesh axis `axis` where a `shard_map` made it manual, else `x`.

    Outside a `shard_map` XLA's partitioner inserts the sum itself, so one module serves both ways of
    being sharded.
    """
    return jax.lax.psum(x, axis) if axis in jax.sharding.get_abstract_mesh().manual_axes else x
