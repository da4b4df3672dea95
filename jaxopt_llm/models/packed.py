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

FUSIONS = frozenset({"qkv", "gate_up", "norm"})  # that `packed` knows


def as_run(model: Transformer) -> Transformer:
    """The model as the engine runs it: packed on one device; on a mesh as it is, to be partitioned by XLA."""
    return packed(model) if mesh_of(model) is None else model


def mesh_of(model: Transformer) -> Mesh | None:
    """The mesh that a model lies on; None for one device.

    Raises:
      ValueError: if it lies on several devices that are no mesh, or in the stages of a pipeline.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(model))]  # which may be shapes
    if len({frozenset(where.device_set) for where in placed}) > 1:
        raise ValueError(
            "parts of the model lie on different devices, as the stages of a pipeline do, which the engine alone runs; "
            "load it with a mesh without `stage`"
        )
    if all(len(where.device_set) == 1 for where in placed):
        return None
    if not all(isinstance(where, NamedSharding) for where in placed):
        raise ValueError("the model is spread over devices without a mesh; load it with mesh=")
    return placed[0].mesh


def packed(model: Transformer, platform: str | None = None, fuse: frozenset[str] = FUSIONS) -> Transformer:
    """A copy for running: q, k and v are one product with the norm before them, gate and up another.

    Its parameters are no longer the canonical ones: it can be neither saved, captured nor trained.

    Args:
      model: on one device, or its local part inside a `shard_map`.
      platform: where it will run; that of the default devices if None.
      fuse: which become one: q, k and v (`qkv`), gate and up (`gate_up`), a product and the norm before it (`norm`).

    Raises:
      ValueError: for a fusion that is none of `FUSIONS`.
    """
    if unknown := fuse - FUSIONS:
        raise ValueError(f"fuse={sorted(unknown)} is unknown; known are {', '.join(sorted(FUSIONS))}")
    pack = functools.partial(kernels.pack, platform=platform)
    model = nnx.merge(*nnx.split(model))  # a copy whose parts can be exchanged
    for layer in model.layers:
        _pack_attention(layer, pack, fuse)
        if hasattr(layer, "mlp"):
            _pack_mlp(layer, pack, fuse)
        else:
            _pack_experts(layer.moe, pack, fuse)
    for _, part in nnx.iter_modules(model):
        if isinstance(part, Norm):
            part.kernel = True
    if hasattr(model, "final_norm"):  # what no stage of a pipeline has but the last
        top = model.embed if model.config.tied else model.head
        top.weight = nnx.Param(pack([top.weight.get_value()]))
    return model


def _pack_attention(layer: Layer, pack: _Pack, fuse: frozenset[str]) -> None:
    attention = layer.attention
    norm = layer.attention_norm if "norm" in fuse else None
    if "qkv" in fuse:
        q, k = (part.weight.get_value().shape[0] for part in (attention.q, attention.k))
        attention.borders = (q, q + k)
        attention.qkv = nnx.data(Fused(_fuse(attention.q, attention.k, attention.v, norm=norm, pack=pack)))
        attention.q = attention.k = attention.v = None  # type: ignore[assignment]
    else:
        for part in (attention.q, attention.k, attention.v):
            _pack_alone(part, pack, norm)
    if "norm" in fuse:
        layer.attention_norm = None
    _pack_alone(attention.o, pack)


def _pack_mlp(layer: Layer, pack: _Pack, fuse: frozenset[str]) -> None:
    mlp = layer.mlp
    norm = layer.mlp_norm if "norm" in fuse else None
    if "gate_up" in fuse:
        mlp.gate_up = nnx.data(Fused(_fuse(mlp.gate, mlp.up, norm=norm, gate=mlp.activation, pack=pack)))
        mlp.gate = mlp.up = None  # type: ignore[assignment]
    else:
        for part in (mlp.gate, mlp.up):
            _pack_alone(part, pack, norm)
    if "norm" in fuse:
        layer.mlp_norm = None
    _pack_alone(mlp.down, pack)


def _pack_experts(moe: MoE, pack: _Pack, fuse: frozenset[str]) -> None:
    """The norm stays: the router reads what it gives."""
    if "gate_up" in fuse:
        gate = moe.activation if moe.limit is None else None
        moe.gate_up = nnx.data(Fused(_fuse(moe.gate, moe.up, norm=None, gate=gate, pack=pack)))
        moe.gate = moe.up = None  # type: ignore[assignment]
    else:
        for part in (moe.gate, moe.up):
            _pack_alone(part, pack)
    _pack_alone(moe.down, pack)


def _pack_alone(part: Linear, pack: _Pack, norm: Norm | None = None) -> None:
    """One product, whose bias stays behind it."""
    part.weight = nnx.Param(pack([part.weight.get_value()], norm=_gain(norm)))


def _fuse(*parts: Linear, norm: Norm | None, gate: str | None = None, pack: _Pack) -> Packed:
    weights = [part.weight.get_value() for part in parts]
    biases = [part.bias.get_value() for part in parts if part.bias is not None]
    bias = jnp.concatenate(biases, axis=-1) if biases else None
    return pack(weights, bias=bias, norm=_gain(norm), gate=gate)


def _gain(norm: Norm | None) -> tuple[jax.Array, float] | None:
    return None if norm is None else (norm.weight.get_value().astype(jnp.float32) + norm.offset, norm.eps)
