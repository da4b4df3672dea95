"""Keys and values in pages: how they lie, and the `jax.numpy` definition of writing and reading them."""

import dataclasses
import importlib.util
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.formats import round_symmetric

GROUP = 16  # keys that the CPU kernel reads at once
_MAX_WIDTH = 512  # of a head, in the CPU kernel
_GPU_WIDTH = 256  # of a head, in the GPU kernel: more does not fit in a block's registers
_LANES = 128  # of a TPU: the width of a head is a multiple


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
      kernel: the platform whose kernel reads them, or None. The CPU's alone writes them too, as they lie as it wants.
    """

    k: Shaped[Array, "..."]
    v: Shaped[Array, "..."]
    k_scale: Float[Array, "..."] | None = None
    v_scale: Float[Array, "..."] | None = None
    kernel: str | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CombinedPages:
    """Keys and values of one layer for the TPU kernel, made by `init_pages`.

    Combined, which a scatter writes in place as long as nothing but the kernel reads them.

    Attributes:
      kv: `[pages, page_size, 2k, h]`, keys of a head and after them its values; k and h are K and H, or as much more as
        the kernel needs. Of heads wider than 128, which the kernel takes one at a time, an array each.
    """

    kv: tuple[Float[Array, "pages page_size heads h"], ...]


LayerCache = Pages | CombinedPages


def init_pages(
    count: int,
    page_size: int,
    heads: int,
    width: int,
    dtype: jnp.dtype,
    *,
    kernel: bool = False,
    sinks: bool = False,
    platform: str | None = None,
) -> LayerCache:
    """Empty pages.

    Args:
      count: of pages.
      page_size: tokens of a page.
      heads, width: K and H.
      dtype: what keys and values are kept in; int8 is rounded to, with a scale a token and head.
      kernel: lay them out for the platform's own kernel where there is one (CPU: float32, bfloat16 or
        int8, page_size and width multiples of 16; GPU: width 256 at most; TPU: float32 or bfloat16, heads
        and width padded to what it takes). `attention` runs that kernel on these pages and no others. For
        programs of one device and the body of a `shard_map`: under automatic partitioning a kernel would
        gather its arguments.
      sinks: the layer has some, which the TPU's kernel does not know.
      platform: where they will be used; that of the default devices if None.

    Raises:
      ValueError: for int8 in the TPU's kernel.

    Warns:
      UserWarning: where the TPU's kernel costs padding, or the TPU's or the GPU's cannot serve.
    """
    dtype = jnp.dtype(dtype)
    platform = platform or jax.default_backend()
    if kernel and platform == "tpu" and _tpu_serves(dtype, sinks):
        parts = heads if width > _LANES else 1
        shape = _tpu_shape(heads // parts, width, dtype)
        return CombinedPages(tuple(jnp.zeros((count, page_size, *shape), dtype) for _ in range(parts)))
    scales = dtype == jnp.int8
    on_cpu = kernel and platform == "cpu" and _cpu_serves(page_size, width, dtype)
    on_gpu = kernel and platform == "gpu" and _gpu_serves(width)
    v_shape: tuple[int, ...] = (
        (count, heads, page_size, width) if on_cpu else (count, page_size, heads, width)
    )
    k_shape = (count, heads, page_size // GROUP, width, GROUP) if on_cpu else v_shape
    scale_shape = v_shape[:-1]
    scale = lambda: jnp.zeros(scale_shape, jnp.float32) if scales else None
    reader = platform if on_cpu or on_gpu else None
    return Pages(jnp.zeros(k_shape, dtype), jnp.zeros(v_shape, dtype), scale(), scale(), reader)


def _cpu_serves(page_size: int, width: int, dtype: jnp.dtype) -> bool:
    return (
        page_size % GROUP == 0
        and width % GROUP == 0
        and width <= _MAX_WIDTH
        and dtype in (jnp.float32, jnp.bfloat16, jnp.int8)
        and library.load() is not None
    )


def _gpu_serves(width: int) -> bool:
    if width > _GPU_WIDTH:
        reason = f"takes heads of width {_GPU_WIDTH} at most, not {width}"
    elif re.match(r"[1-7]\.", getattr(jax.devices()[0], "compute_capability", "")):
        reason = "needs an NVIDIA card of compute capability 8.0 or more, as Triton does"
    elif importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        reason = f"needs Pallas for Triton, which jax {jax.__version__} no longer has"
    else:
        return True
    warnings.warn(f"the GPU's attention kernel {reason}: attention runs in XLA", stacklevel=3)
    return False


def _tpu_serves(dtype: jnp.dtype, sinks: bool) -> bool:
    if dtype == jnp.int8:
        raise ValueError(
            "int8 keys and values need one scale a tensor on a TPU, which nothing gives yet; "
            "take cache_dtype='bfloat16'"
        )
    if sinks:
        warnings.warn("the TPU's attention kernel knows no sinks: attention runs in XLA", stacklevel=3)
    return not sinks and dtype in (jnp.float32, jnp.bfloat16)


def _tpu_shape(heads: int, width: int, dtype: jnp.dtype) -> tuple[int, int]:
    """2k and h: rows of 32 bits in whole tiles of 8, or a tile's half, quarter or eighth; whole lanes."""
    rows = lambda k: 2 * k * dtype.itemsize / 4
    k = next(k for k in itertools.count(heads) if rows(k) in (1, 2, 4) or rows(k) % 8 == 0)
    h = -(-width // _LANES) * _LANES
    if (k, h) != (heads, width):
        warnings.warn(
            f"the TPU's attention kernel takes no {heads} key/value heads of width {width}: "
            f"pages hold {k} of width {h}, {k * h / (heads * width):.3g} times the bytes",
            stacklevel=3,
        )
    return 2 * k, h


def kept(x: Float[Array, "T K H"], dtype: jnp.dtype) -> Float[Array, "T K H"]:
    """What pages of `dtype` give back for `x`, in the dtype of `x`."""
    return _decode(*_encode(x, dtype), x.dtype)


def write(
    pages: LayerCache,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page: Int[Array, "T"],
    place: Int[Array, "T"],
) -> LayerCache:
    """Each token at its place in its page; those whose page is out of range are dropped. Not for the CPU kernel's."""
    put = lambda store, new: store.at[page, place].set(new, mode="drop")
    if isinstance(pages, CombinedPages):
        parts = zip(pages.kv, *(jnp.array_split(x, len(pages.kv), axis=1) for x in (k, v)), strict=True)
        return CombinedPages(tuple(put(kv, _combined(k, v, kv)) for kv, k, v in parts))
    (k, k_scale), (v, v_scale) = _encode(k, pages.k.dtype), _encode(v, pages.v.dtype)
    new = dataclasses.replace(pages, k=k, v=v, k_scale=k_scale, v_scale=v_scale)
    return jax.tree.map(put, pages, new)


def _combined(k: Float[Array, "T K H"], v: Float[Array, "T K H"], kv: Array) -> Float[Array, "T k2 h"]:
    tokens, heads, width = k.shape
    pairs = jnp.stack([k, v], axis=2).reshape(tokens, 2 * heads, width)
    more = (kv.shape[2] - 2 * heads, kv.shape[3] - width)
    return jnp.pad(pairs, ((0, 0), (0, more[0]), (0, more[1]))).astype(kv.dtype)


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
