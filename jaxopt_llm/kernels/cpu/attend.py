"""Attention over pages, as a call of the C++ kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.pages import Pages

_EVERYTHING = 2**62  # a window that leaves nothing out


def attend(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: Pages,
    *,
    positions: Int[Array, "T"],
    slots: Int[Array, "T"],
    table: Int[Array, "R P"],
    sinks: Float[Array, "N"] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Writes keys and values into pages that `init_pages(kernel=True)` made, and attends to them.

    A row of the result has the same bits whatever rows stand beside it, however its sequence was cut into
    batches, whatever the page size and however many threads work. Padding gives zeros. Pages are updated
    in place where the caller's program owns them.

    Raises:
      ValueError: if the heads or widths do not go together.
    """
    library.load()
    _check(q, k, pages)
    dtype = q.dtype if q.dtype == jnp.bfloat16 else jnp.dtype(jnp.float32)
    stores = (pages.k, pages.v, _or_empty(pages.k_scale), _or_empty(pages.v_scale))
    same = lambda a, dtype: jax.ShapeDtypeStruct(a.shape, dtype)
    call = jax.ffi.ffi_call(
        "jaxopt_attention",
        (same(q, dtype), *(same(store, store.dtype) for store in stores)),
        input_output_aliases={7 + i: 1 + i for i in range(len(stores))},
    )
    out, keys, values, k_scale, v_scale = call(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        positions.astype(jnp.int32),
        slots.astype(jnp.int32),
        table.astype(jnp.int32),
        _or_empty(None if sinks is None else sinks.astype(jnp.float32)),
        *stores,
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0),
        window=np.int64(_EVERYTHING if window is None else window),
    )
    pages = dataclasses.replace(pages, k=keys, v=values)
    if pages.k_scale is not None:
        pages = dataclasses.replace(pages, k_scale=k_scale, v_scale=v_scale)
    return out.astype(q.dtype), pages


def _check(q: Array, k: Array, pages: Pages) -> None:
    heads, width = pages.v.shape[1], pages.v.shape[3]
    if k.shape[1:] != (heads, width):
        raise ValueError(f"pages of {heads} heads of width {width} cannot keep keys {k.shape[1:]}")
    if q.shape[1] % heads or q.shape[2] != width:
        raise ValueError(f"queries {q.shape[1:]} do not go with keys {k.shape[1:]}")


def _or_empty(a: Array | None) -> Array:
    return jnp.zeros(0) if a is None else a
