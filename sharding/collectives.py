"""Collectives that mean the same inside and outside a `shard_map`.

Outside one XLA's partitioner inserts what is needed itself, so one module serves both ways of being sharded.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def psum(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The sum over mesh axis `axis` where a `shard_map` made it manual, else `x`."""
    return jax.lax.psum(x, axis) if is_manual(axis) else x


def join_last(x: Float[Array, "..."], axis: str) -> Float[Array, "..."]:
    """The last dimension put together from its parts over `axis` where a `shard_map` made it manual, else `x`."""
    return jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True) if is_manual(axis) else x


def axis_index(axis: str) -> Int[Array, ""]:
    """Which shard this is along `axis`; 0 outside a `shard_map`."""
    return jax.lax.axis_index(axis) if is_manual(axis) else jnp.zeros((), jnp.int32)


def axis_size(axis: str) -> int:
    """How many shards there are along `axis` where a `shard_map` made it manual, else 1."""
    return jax.lax.axis_size(axis) if is_manual(axis) else 1


def is_manual(axis: str) -> bool:
    """Whether a `shard_map` made this axis manual, so that shapes are local along it."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes
