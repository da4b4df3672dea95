"""`Batch`: which token belongs to which slot at which position. `Cache`: the pages of every layer."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxopt_llm import kernels
from jaxopt_llm.kernels import LayerCache
from jaxopt_llm.models.config import ModelConfig

Cache = tuple[LayerCache, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A flat ragged batch: every forward takes one.

    Attributes:
      tokens: `[T]`.
      positions: `[T]`, of each token in its sequence.
      slots: `[T]`, the sequence of each token; R for padding.
      kv_len: `[R]`, tokens of each sequence once this batch is in.
      query_start: `[R+1]`, where each slot's tokens start.
      num_slots: slots in use.
      page_table: `[G, R, P]`, or None where there is no cache.
      shape: (B, T) of a uniform batch whose rows all start at position 0, else None.
    """

    tokens: Int[Array, "T"]
    positions: Int[Array, "T"]
    slots: Int[Array, "T"]
    kv_len: Int[Array, "R"]
    query_start: Int[Array, "R1"]
    num_slots: Int[Array, ""]
    page_table: Int[Array, "G R P"] | None = None
    shape: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def dense(
        cls,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, "B"] | None = None,
        page_table: Int[Array, "G B P"] | None = None,
    ) -> Self:
        """Rows that start at position 0; those shorter than T are padded at the end."""
        rows, length = tokens.shape
        lengths = jnp.full(rows, length, jnp.int32) if lengths is None else lengths
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
        slots = jnp.where(positions < lengths[:, None], jnp.arange(rows, dtype=jnp.int32)[:, None], rows)
        return cls(
            tokens=tokens.reshape(-1),
            positions=positions.reshape(-1),
            slots=slots.reshape(-1),
            kv_len=lengths,
            query_start=jnp.arange(rows + 1, dtype=jnp.int32) * length,
            num_slots=jnp.asarray(rows, jnp.int32),
            page_table=page_table,
            shape=(rows, length),
        )

    @classmethod
    def decode(
        cls, tokens: Int[Array, "R"], positions: Int[Array, "R"], page_table: Int[Array, "G R P"]
    ) -> Self:
        """One token of each slot."""
        rows = tokens.shape[0]
        return cls(
            tokens=tokens,
            positions=positions,
            slots=jnp.arange(rows, dtype=jnp.int32),
            kv_len=positions + 1,
            query_start=jnp.arange(rows + 1, dtype=jnp.int32),
            num_slots=jnp.asarray(rows, jnp.int32),
            page_table=page_table,
        )


def init_cache(
    config: ModelConfig,
    num_pages: Sequence[int],
    page_size: int,
    dtype: jnp.dtype,
    *,
    kernel: bool = False,
    shards: int = 1,
    platform: str | None = None,
    layers: Iterable[int] | None = None,
) -> Cache:
    """Empty pages for every layer, or for some.

    Args:
      config: of the model.
      num_pages: pages of each kind of attention, as `ModelConfig.window_kinds`.
      page_size: tokens a page.
      dtype: of keys and values.
      kernel, platform: as `kernels.init_pages` has them.
      shards: of the tensor axis; the pages are those of one.
      layers: which; None for all.
    """
    counts = [num_pages[config.kind(layer)] for layer in layers or range(config.num_layers)]
    width = (config.kv_heads_of_shard(shards), config.head_dim)
    make = functools.partial(
        kernels.init_pages, kernel=kernel, sinks=config.attention_sinks, platform=platform
    )
    return tuple(make(count, page_size, *width, dtype) for count in counts)
