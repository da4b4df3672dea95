"""Keys and values in pages: how they lie, and the `jax.numpy` definition of writing and reading them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.qarray import round_symmetric

GROUP = 16  # keys that the CPU kernel reads at once
_MAX_WIDTH = 512  # of a head, in the CPU kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of one layer, made by `init_pages`.

    Two arrays rather than one: XLA updates them in place, where pages that combine both are copied at
    every write.

    Attributes:
      k, v: `[pages, page_size, K, H]` each. For the CPU kernel `[pages, K, page_size/16, H, 16]` and
        `[pages, K, page_size, H]`: a vector is one feature of 16 keys, or 16 features of one value.
      k_scale, v_scale: of int8 codes, a float a token and head: `[pages, page_size, K]`, for the kernel
        `[pages, K, page_size]`. None for floats.
      kernel: whether they lie as the CPU kernel wants them; then it alone writes and reads them.
    """

    k: Shaped[Array, "..."]
    v: Shaped[Array, "..."]
    k_scale: Float[Array, "..."] | None = None
    v_scale: Float[Array, "..."] | None = None
    kernel: bool = dataclasses.field(default=False, metadata={"static": True})


def init_pages(
    count: int,
    page_size: int,
    heads: int,
    width: int,
    dtype: jnp.dtype,
    *,
    kernel: bool = False,
    platform: str | None = None,
) -> Pages:
    """Empty pages.

    Args:
      count: of pages.
      page_size: tokens of a page.
      heads, width: K and H.
      dtype: what keys and values are kept in; int8 is rounded to, with a scale a token and head.
      kernel: lay them out for the platform's own kernel where there is one (CPU: float32, bfloat16 or
        int8, page_size and width multiples of 16). `attention` runs that kernel on these pages and no
        others. For programs of one device and the body of a `shard_map`: under automatic partitioning
        a kernel would gather its arguments.
      platform: where they will be used; that of the default devices if None.
    """
    dtype = jnp.dtype(dtype)
    scales = dtype == jnp.int8
    kernel = kernel and _fits(page_size, width, dtype, platform or jax.default_backend())
    v_shape: tuple[int, ...] = (
        (count, heads, page_size, width) if kernel else (count, page_size, heads, width)
    )
    k_shape = (count, heads, page_size // GROUP, width, GROUP) if kernel else v_shape
    scale_shape = v_shape[:-1]
    scale = lambda: jnp.zeros(scale_shape, jnp.float32) if scales else None
    return Pages(jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype), scale(), scale(), kernel)


def _fits(page_size: int, width: int, dtype: jnp.dtype, platform: str) -> bool:
    return (
        platform == "cpu"
        and page_size % GROUP == 0
        and width % GROUP == 0
        and width <= _MAX_WIDTH
        and dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
        and library.load() is not None
    )


def kept(x: Float[Array, "T K H"], dtype: jnp.dtype) -> Float[Array, "T K H"]:
    """What pages of `dtype` give back for `x`, in the dtype of `x`."""
    return _decode(*_encode(x, dtype), x.dtype)


def write(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page: Int[Array, "T"],
    place: Int[Array, "T"],
) -> Pages:
    """Each token at its place in its page; those whose page is out of range are dropped."""

    (k, k_scale), (v, v_scale) = _encode(k, pages.k.dtype), _encode(v, pages.v.dtype)
    put = lambda store, new: store.at[page, place].set(new, mode="drop")
    return jax.tree.map(put, pages, Pages(k, v, k_scale, v_scale))


def read(
    pages: Pages, table: Int[Array, "P"], dtype: jnp.dtype
) -> tuple[Float[Array, "S K H"], Float[Array, "S K H"]]:
    """Keys and values of a slot, in order."""

    def get(store: Array, scale: Array | None) -> Array:
        values = _decode(store[table], None if scale is None else scale[table], dtype)
        return values.reshape(-1, *values.shape[2:])

    return get(pages.k, pages.k_scale), get(pages.v, pages.v_scale)


def _encode(
    x: Float[Array, "*B H"], dtype: jnp.dtype
) -> tuple[Shaped[Array, "*B H"], Float[Array, "*B"] | None]:
    if dtype != jnp.int8:
        return x.astype(dtype), None
    codes, scale = round_symmetric(x.astype(jnp.float32), bits=8, group=x.shape[-1])
    return codes, scale[..., 0]


def _decode(
    data: Shaped[Array, "*B H"], scale: Float[Array, "*B"] | None, dtype: jnp.dtype
) -> Float[Array, "*B H"]:
    return (
        data.astype(dtype) if scale is None else (data.astype(jnp.float32) * scale[..., None]).astype(dtype)
    )
