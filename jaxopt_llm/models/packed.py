"""A model whose weights lie as the platform's kernels want them, fused with their neighbours: what the engine runs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxopt_llm import kernels
from jaxopt_llm.kernels import Packed
from jaxopt_llm.models.layers import Fused, Linear, Norm
from jaxopt_llm.models.transformer import Layer, MoE, Transformer

_Pack = Callable[..., Packed]


def as_run(model: Transformer) -> Transformer:
    """The model as the engine runs it: packed on one device; on a mesh as it is, to be partitioned by XLA."""
    return packed(model) if mesh_of(model) is None else model


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that a model lies on; None for one device.

    Raises:
      ValueError: if it lies on several devices that are no mesh.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(model))]  # which may be shapes
    if all(len(where.device_set) == 1 for where in placed):
        return None
    if not all(isinstance(where, NamedSharding) for where in placed):
        raise ValueError("the model is spread over devices without a mesh; load it with mesh=")
    return placed[0].mesh


def packed(model: Transformer, platform: str | None = None) -> Transformer:
    """A copy for running: q, k and v are one product with the norm before them, gate and up another.

    Its parameters are no longer the canonical ones: it can be neither saved, captured nor trained.

    Args:
      model: on one device, or its local part inside a `shard_map`.
      platform: where it will run; that of the default devices if None.
    """
    pack = functools.partial(kernels.pack, platform=platform)
    model = nnx.merge(*nnx.split(model))  # a copy whose parts can be exchanged
    for layer in model.layers:
        _pack_attention(layer, pack)
        if hasattr(layer, "mlp"):
            _pack_mlp(layer, pack)
        else:
            _pack_experts(layer.moe, pack)
    for _, part in nnx.iter_modules(model):
        if isinstance(part, Norm):
            part.kernel = True
    top = model.embed if model.config.tied else model.head
    top.weight = nnx.Param(pack([top.weight.get_value()]))
    return model


def _pack_attention(layer: Layer, pack: _Pack) -> None:
    attention = layer.attention
    q, k = (part.weight.get_value().shape[0] for part in (attention.q, attention.k))
    attention.borders = (q, q + k)
    attention.qkv = nnx.data(
        Fused(_fuse(attention.q, attention.k, attention.v, norm=layer.attention_norm, pack=pack))
    )
    attention.q = attention.k = attention.v = None  # type: ignore[assignment]
    layer.attention_norm = None
    attention.o.weight = nnx.Param(pack([attention.o.weight.get_value()]))


def _pack_mlp(layer: Layer, pack: _Pack) -> None:
    mlp = layer.mlp
    mlp.gate_up = nnx.data(
        Fused(_fuse(mlp.gate, mlp.up, norm=layer.mlp_norm, gate=mlp.activation, pack=pack))
    )
    mlp.gate = mlp.up = None  # type: ignore[assignment]
    layer.mlp_norm = None
    mlp.down.weight = nnx.Param(pack([mlp.down.weight.get_value()]))


def _pack_experts(moe: MoE, pack: _Pack) -> None:
    """The norm stays: the router reads what it gives."""
    gate = moe.activation if moe.limit is None else None
    moe.gate_up = nnx.data(Fused(_fuse(moe.gate, moe.up, norm=None, gate=gate, pack=pack)))
    moe.gate = moe.up = None  # type: ignore[assignment]
    moe.down.weight = nnx.Param(pack([moe.down.weight.get_value()]))


def _fuse(*parts: Linear, norm: Norm | None, gate: str | None = None, pack: _Pack) -> Packed:
    weights = [part.weight.get_value() for part in parts]
    biases = [part.bias.get_value() for part in parts if part.bias is not None]
    bias = jnp.concatenate(biases, axis=-1) if biases else None
    if norm is None:
        return pack(weights, bias=bias, gate=gate)
    gain = norm.weight.get_value().astype(jnp.float32) + norm.offset
    return pack(weights, bias=bias, norm=(gain, norm.eps), gate=gate)
