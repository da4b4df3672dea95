"""The one decoder: every family is a `ModelConfig` of it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm import kernels, sharding
from jaxopt_llm.kernels import AttentionSpec, LayerCache
from jaxopt_llm.models.batch import Batch, Cache
from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.layers import Embedding, Fused, Linear, Norm, parameter
from jaxopt_llm.models.rope import rotate, rotation

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_SWIGLU_SLOPE = 1.702  # gpt-oss: the sigmoid that comes nearest to GELU


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) over pages or over a uniform batch."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        project = functools.partial(Linear, dtype=dtype, rngs=rngs)
        d, q_width, kv_width = config.d_model, config.q_width, config.kv_width
        self.q = project((q_width, d), ("heads", "embed"), bias=config.qkv_bias)
        self.k = project((kv_width, d), ("kv_heads", "embed"), bias=config.qkv_bias)
        self.v = project((kv_width, d), ("kv_heads", "embed"), bias=config.qkv_bias)
        self.o = project((d, q_width), ("embed", "heads"), bias=config.o_bias, reduce="tensor")
        norm = functools.partial(Norm, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype, rngs=rngs)
        widths = {
            "head": ((config.head_dim, None), (config.head_dim, None)),
            "width": ((q_width, "heads"), (kv_width, "kv_heads")),
        }
        norms = [norm(width, axes=(axis,)) for width, axis in widths.get(config.qk_norm or "", ())]
        self.q_norm: Norm | None
        self.k_norm: Norm | None
        self.q_norm, self.k_norm = norms or (None, None)
        self.qkv: Fused | None = None  # of a packed model, in the place of q, k, v and the norm before them
        self.borders: tuple[int, int] = (0, 0)  # between the three in it
        sinks = config.attention_sinks
        self.sinks = parameter(rngs, (config.num_heads,), ("heads",), dtype) if sinks else None
        self.head_dim, self.norm_width = config.head_dim, config.qk_norm == "width"
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        self.spec = AttentionSpec(
            scale=config.query_scale or config.head_dim**-0.5,
            window=config.windows[layer],
            softcap=config.attention_softcap,
            kind=config.kind(layer),
        )

    def __call__(
        self, x: Float[Array, "T D"], turn: Float[Array, "2 T 1 half"], batch: Batch, cache: LayerCache | None
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        q, k, v = self._project(x)
        q, k, v = self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v, None)
        k, v = self._read_by(q, k), self._read_by(q, v)
        sinks = None if self.sinks is None else self.sinks.get_value()
        out, cache = kernels.attention(rotate(q, turn), rotate(k, turn), v, batch, cache, self.spec, sinks)
        return self.o(out.reshape(x.shape[0], -1)), cache

    def _project(self, x: Float[Array, "T D"]) -> Sequence[Float[Array, "T width"]]:
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        return jnp.split(self.qkv(x), self.borders, axis=-1)

    def _read_by(self, q: Float[Array, "T N H"], kv: Float[Array, "T K H"]) -> Float[Array, "T k H"]:
        """The key or value heads that these queries read: a shard of few may hold more, where K does not divide."""
        own = max(1, q.shape[1] // self.queries_per_kv)
        if kv.shape[1] == own:
            return kv
        first = sharding.axis_index("tensor") * q.shape[1] // self.queries_per_kv
        return jax.lax.dynamic_slice_in_dim(kv, first, own, axis=1)

    def _heads(self, y: Float[Array, "T width"], norm: Norm | None) -> Float[Array, "T heads H"]:
        if norm is not None and self.norm_width:
            y, norm = norm(y), None
        y = y.reshape(y.shape[0], -1, self.head_dim)  # head counts from the array: global or local
        return y if norm is None else norm(y)


class MLP(nnx.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        project = functools.partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = project((config.d_ff, config.d_model), ("mlp", "embed"))
        self.up = project((config.d_ff, config.d_model), ("mlp", "embed"))
        self.down = project((config.d_model, config.d_ff), ("embed", "mlp"), reduce="tensor")
        self.gate_up: Fused | None = (
            None  # of a packed model, in the place of gate, up and the norm before them
        )
        self.activation = config.activation

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        return self.down(self._gated(x) if self.gate_up is None else self.gate_up(x))

    def _gated(self, x: Float[Array, "T D"]) -> Float[Array, "T F"]:
        return _ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)


class MoE(nnx.Module):
    """Top-k mixture of gated feed-forward experts (arXiv:2401.04088, section 2.1)."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        experts = config.experts
        if experts is None:
            raise ValueError("config.experts is None")
        count, width, d = experts.count, experts.d_ff, config.d_model
        project = functools.partial(Linear, bias=experts.bias, dtype=dtype, rngs=rngs)
        self.router = project((count, d), (None, "embed"))
        self.gate = project((count, width, d), ("experts", "expert_mlp", "embed"))
        self.up = project((count, width, d), ("experts", "expert_mlp", "embed"))
        self.down = project((count, d, width), ("experts", "embed", "expert_mlp"), reduce="tensor")
        self.gate_up: Fused | None = None  # of a packed model, in the place of gate and up
        self.experts = experts
        self.activation, self.limit = config.activation, config.swiglu_limit

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        shares, chosen = self._route(x)
        shards = sharding.axis_size("expert")
        own = self.experts.count // shards
        first = sharding.axis_index("expert") * own
        out = kernels.moe(x, shares, chosen - first, self._feed_forward, own, some=shards > 1)
        return sharding.psum(out, "expert")

    def _route(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(shares, self.experts.per_token)
        return top / top.sum(-1, keepdims=True) if self.experts.renormalize else top, chosen

    def _feed_forward(self, x: Array, expert: Array, sizes: Array) -> Array:
        if self.gate_up is None:
            hidden = self._gated(self.gate.grouped(x, expert, sizes), self.up.grouped(x, expert, sizes))
        else:
            hidden = self.gate_up.grouped(x, sizes)
            if self.limit is not None:  # an activation that the kernel does not know
                hidden = self._gated(*jnp.split(hidden, 2, axis=-1))
        return self.down.grouped(hidden, expert, sizes)

    def _gated(self, gate: Array, up: Array) -> Array:
        if self.limit is None:
            return _ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(_SWIGLU_SLOPE * gate)


class Layer(nnx.Module):
    """Attention and feed-forward, each with its norms and residual."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        norm = functools.partial(
            Norm, config.d_model, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype, rngs=rngs
        )
        self.attention_norm = norm() if config.pre_norm else None
        self.attention = Attention(config, layer, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm() if config.post_norm else None
        self.mlp_norm = norm() if config.pre_norm else None
        if config.has_experts(layer):
            self.moe = MoE(config, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norm else None

    def __call__(
        self, x: Float[Array, "T D"], turn: Float[Array, "2 T 1 half"], batch: Batch, cache: LayerCache | None
    ) -> tuple[Float[Array, "T D"], LayerCache | None]:
        with jax.named_scope("attention"):
            y, cache = self.attention(_apply(self.attention_norm, x), turn, batch, cache)
            x = x + _apply(self.attention_post_norm, y)
        with jax.named_scope("mlp"):
            feed_forward = self.moe if hasattr(self, "moe") else self.mlp
            y = feed_forward(_apply(self.mlp_norm, x))
            return x + _apply(self.mlp_post_norm, y), cache


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
      config: what the model is.
      dtype: of parameters and activations; scores, norms and logits are computed in float32.
      rngs: for random initial weights; None leaves shapes in their place.
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs | None):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(Layer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers))
        self.first_layer = (
            0  # which of the config's the first one here is: more in a later stage of a pipeline
        )
        self.final_norm = Norm(
            config.d_model, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype, rngs=rngs
        )
        if not config.tied:
            shape = (config.vocab_size, config.d_model)
            self.head = Linear(shape, ("vocab", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
        """Logits, float32, of whole sequences without a cache: the forward below, flattened."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}, not [B, T]; one sequence is tokens[None]")
        hidden, _ = self.forward(Batch.dense(jnp.asarray(tokens)), None)
        return self.logits(hidden).reshape(*tokens.shape, -1)

    @overload
    def forward(self, batch: Batch, cache: None) -> tuple[Float[Array, "T D"], None]: ...
    @overload
    def forward(self, batch: Batch, cache: Cache) -> tuple[Float[Array, "T D"], Cache]: ...
    def forward(self, batch: Batch, cache: Cache | None) -> tuple[Float[Array, "T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with this batch's keys and values in it."""
        hidden, cache = self.through(self.embedded(batch.tokens), batch, cache)
        return self.normed(hidden), cache

    @jax.named_scope("embed")
    def embedded(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Hidden states before the first layer."""
        x = self.embed(tokens, self.dtype)
        return (
            x * jnp.asarray(math.sqrt(self.config.d_model), self.dtype) if self.config.scale_embedding else x
        )

    @overload
    def through(
        self, hidden: Float[Array, "T D"], batch: Batch, cache: None
    ) -> tuple[Float[Array, "T D"], None]: ...
    @overload
    def through(
        self, hidden: Float[Array, "T D"], batch: Batch, cache: Cache
    ) -> tuple[Float[Array, "T D"], Cache]: ...
    def through(
        self, hidden: Float[Array, "T D"], batch: Batch, cache: Cache | None
    ) -> tuple[Float[Array, "T D"], Cache | None]:
        """Hidden states after the last layer here, of those before the first; the cache is that of these layers."""
        ropes = [self.config.layer_rope(self.first_layer + i) for i in range(len(self.layers))]
        with jax.named_scope("embed"):
            turn = lambda rope: rotation(rope, self.config.head_dim, batch.positions)
            turns = {rope: turn(rope) for rope in dict.fromkeys(ropes)}
        pages = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{self.first_layer + i}"):
                hidden, written = layer(hidden, turns[ropes[i]], batch, None if cache is None else cache[i])
            pages.append(written)
        return hidden, None if cache is None else tuple(pages)

    @jax.named_scope("head")
    def normed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Hidden states after the final norm, of those after the last layer."""
        return self.final_norm(hidden)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of the next token, float32."""
        with jax.named_scope("head"):
            scores = self.embed.attend(hidden) if self.config.tied else self.head(hidden)
            if scores.shape[-1] != self.config.vocab_size:
                scores = sharding.join_last(scores, "tensor")
            scores = scores.astype(jnp.float32)
            cap = self.config.logit_softcap
            return scores if cap is None else cap * jnp.tanh(scores / cap)
