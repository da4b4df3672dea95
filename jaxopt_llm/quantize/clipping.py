"""The range that a group's codes span: narrower than its values, where that costs the outputs less."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxopt_llm.kernels import Format, QArray

_SHARES = tuple(1 - step / 40 for step in range(20))  # of the full range, down to about half

Grid = tuple[Float[Array, "O G"], Float[Array, "O G"] | None]


def output_error(change: Float[Array, "O I"], gram: Float[Array, "I I"]) -> Float[Array, ""]:
    """Squared error of all outputs when the weights change: `sum((X @ change.T)**2)` of `gram = X.T @ X`."""
    return jnp.sum(jnp.matmul(change, gram, precision=jax.lax.Precision.HIGHEST) * change)


@functools.partial(jax.jit, static_argnames=("format", "clip"))
def grid(w: Float[Array, "O I"], gram: Float[Array, "I I"], *, format: Format, clip: bool) -> Grid:
    """Scale and bias (None where codes are symmetric) of every group of a weight.

    With `clip` each group takes that share of its range, of 20 down to about half of it, whose rounding to nearest
    changes the group's part of the outputs least (as the code of arXiv:2306.00978 does); else all of it.
    """
    groups = w.reshape(w.shape[0], -1, format.group or w.shape[1])
    low, high = format.span(groups)
    if not clip:
        return format.grid(low, high)
    own = _own_moments(gram, groups.shape[-1])

    def loss(share: Array) -> Float[Array, "O G"]:
        scale, bias = _over_columns(*format.grid(share * low, share * high))
        change = decode(format.encode(groups, scale, bias), scale, bias) - groups
        moved = jnp.einsum("ogi,gij->ogj", change, own, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(moved * change, -1)

    shares = jnp.asarray(_SHARES, jnp.float32)
    best = shares[jax.lax.map(loss, shares).argmin(0)]
    return format.grid(best * low, best * high)


def _own_moments(gram: Float[Array, "I I"], group: int) -> Float[Array, "G g g"]:
    """The blocks of a gram along its diagonal."""
    count = gram.shape[0] // group
    return jnp.einsum("aiaj->aij", gram.reshape(count, group, count, group))


def _over_columns(scale: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """A grid in a shape that broadcasts against the columns of its groups."""
    return scale[..., None], None if bias is None else bias[..., None]


def decode(codes: Shaped[Array, "..."], scale: Array, bias: Array | None) -> Float[Array, "..."]:
    """What codes that are not packed stand for on a grid whose arrays broadcast against them, float32."""
    values = codes.astype(jnp.float32) * scale.astype(jnp.float32)
    return values if bias is None else values + bias.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="format")
def round_on(w: Float[Array, "O I"], scale: Array, bias: Array | None, *, format: Format) -> QArray:
    """A weight rounded to nearest on a given grid."""
    groups = w.reshape(*scale.shape, -1)
    codes = format.encode(groups, *_over_columns(scale, bias)).reshape(w.shape)
    return format.assemble(codes, scale, bias)
