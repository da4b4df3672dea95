"""The parts that layers are made of: parameters with logical axes, products, norms."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm import kernels, sharding
from jaxopt_llm.kernels import Packed, Weight

Axes = Sequence[str | None]


def parameter(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, fill: float | None = None
) -> nnx.Param:
    """A parameter that knows its logical axes; normal of width 0.02, or `fill`. Without `rngs` it is a shape alone."""
    value: jax.Array | jax.ShapeDtypeStruct
    if rngs is None:
        value = jax.ShapeDtypeStruct(shape, dtype)
    elif fill is None:
        value = (jax.random.normal(rngs.params(), shape) * 0.02).astype(dtype)
    else:
        value = jnp.full(shape, fill, dtype)
    return nnx.Param(value, axes=tuple(axes))


class Linear(nnx.Module):
    """`x @ weight.T + bias`, the weight plain or quantized.

    Args:
      shape: (O, I), or (E, O, I) for one weight an expert.
      axes: logical axes of `shape`.
      reduce: mesh axis over which the products of a row-parallel weight are summed.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool = False,
        reduce: str | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        self.weight = parameter(rngs, shape, axes, dtype)
        self.bias = parameter(rngs, shape[:-1], axes[:-1], dtype, fill=0.0) if bias else None
        self.reduce = reduce

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = self._sum(kernels.linear(x, self.weight.get_value()))
        return y if self.bias is None else y + kernels.per_feature(self.bias.get_value().astype(y.dtype), y)

    def grouped(
        self, x: Float[Array, "M I"], expert: Int[Array, "M"], sizes: Int[Array, "E"]
    ) -> Float[Array, "M O"]:
        """The product of rows sorted by expert, `sizes` of each, with their own experts' weights."""
        y = self._sum(kernels.grouped_linear(x, self.weight.get_value(), sizes))
        return y if self.bias is None else y + self.bias.get_value()[expert].astype(y.dtype)

    def _sum(self, y: Array) -> Array:
        return sharding.psum(y, self.reduce) if self.reduce else y


class Fused(nnx.Module):
    """Several projections of one input as one product: what `packed` puts in the place of `Linear`s."""

    def __init__(self, weight: Packed):
        self.weight = nnx.Param(weight)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        return kernels.linear(x, self.weight.get_value())

    def grouped(self, x: Float[Array, "M I"], sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        """As `Linear.grouped`."""
        return kernels.grouped_linear(x, self.weight.get_value(), sizes)


class Embedding(nnx.Module):
    """A table of rows; `attend` uses it as the head."""

    def __init__(self, vocab: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.weight = parameter(rngs, (vocab, width), ("vocab", "embed"), dtype)
        self.vocab = vocab

    def __call__(self, ids: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
        table = self.weight.get_value()
        rows = table.shape[0]
        if rows == self.vocab:
            return kernels.embed(ids, table, dtype)
        local = ids - sharding.axis_index("tensor") * rows  # this shard's rows alone
        own = (local >= 0) & (local < rows)
        found = kernels.embed(jnp.where(own, local, 0), table, dtype)
        return sharding.psum(jnp.where(own[..., None], found, 0), "tensor")

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return kernels.linear(x, self.weight.get_value())


class Norm(nnx.Module):
    """Root-mean-square norm whose gain is `weight + offset`."""

    def __init__(
        self,
        width: int,
        *,
        axes: Axes = (None,),
        eps: float,
        offset: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        self.weight = parameter(rngs, (width,), axes, dtype, fill=1.0 - offset)
        self.width, self.eps, self.offset = width, eps, offset
        self.kernel = False  # of a packed model: rows that do not depend on their number

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        gain = self.weight.get_value().astype(jnp.float32) + self.offset
        if x.shape[-1] == self.width:
            return kernels.rms_norm(x, gain, eps=self.eps, kernel=self.kernel)
        wide = x.astype(jnp.float32)  # a shard's part of the width: the mean is over all parts
        mean = sharding.psum(jnp.sum(wide * wide, axis=-1, keepdims=True), "tensor") / self.width
        return (wide * jax.lax.rsqrt(mean + self.eps) * kernels.per_feature(gain, x)).astype(x.dtype)


def flat_params(module: nnx.Module) -> dict[str, Any]:
    """Every parameter variable under its dotted name, such as `layers.0.attention.q.weight`."""
    return {
        ".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def weights(module: nnx.Module) -> dict[str, Weight]:
    """Every parameter's value under its dotted name."""
    return {name: param.get_value() for name, param in flat_params(module).items()}
