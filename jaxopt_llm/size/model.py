"""What one device of a mesh holds, reads and computes of a model: counted from shapes, split as the engine splits."""

import collections
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Self

import jax
import jax.numpy as jnp

from jaxopt_llm.kernels import QArray, init_pages
from jaxopt_llm.kernels.formats import Format, quantization_format
from jaxopt_llm.models import ModelConfig, ParamSpec, abstract, quantizable, shardings, specs
from jaxopt_llm.sharding import MeshSpec, Sharding

FLOAT, KV_DTYPES = "bf16", ("bf16", "int8")
_PAGE = 16  # tokens: as many as each platform's kernel takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The parameters of a model, those of layers that are alike once."""

    config: ModelConfig
    parameters: tuple[tuple[str, ParamSpec, int], ...]  # and how many layers have one like it

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        own = specs(abstract(config, jnp.bfloat16)).items()
        counted = collections.Counter((re.sub(r"^layers\.\d+", "layers.0", name), spec) for name, spec in own)
        return cls(config=config, parameters=tuple((*one, count) for one, count in counted.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one device of a mesh has of a model; bytes and operations are its own.

    Attributes:
      config: of the model.
      tensor: shards of each layer.
      weight_bytes: of all parameters, scales included.
      dense_bytes: of those that every step reads: neither experts nor an embedding that is only looked up.
      expert_bytes: of experts, of which a step reads those that its tokens are sent to.
      token_flops: of the products that each token goes through.
      row_flops: of the head, for each row whose logits are wanted.
      kv_bytes: a token and layer.
      layers: how many see so many positions; infinity for all.
      float_bytes: of a number of activations, and of whatever is not rounded.
      integer: whether products take int8 activations and weights, at the chip's rate for those.
    """

    config: ModelConfig
    tensor: int
    weight_bytes: int
    dense_bytes: int
    expert_bytes: int
    token_flops: float
    row_flops: float
    kv_bytes: int
    layers: tuple[tuple[float, int], ...]
    float_bytes: int
    integer: bool

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        mesh: MeshSpec,
        weights: str = FLOAT,
        kv: str = FLOAT,
        platform: str | None = None,
    ) -> Self:
        """The share on a mesh of `data` and `tensor` axes.

        Args:
          shapes: of the model.
          mesh: over which it is spread.
          weights: `bf16` (on a CPU float32 in its place), or a format that `--quantize` takes.
          kv: dtype of keys and values, of `KV_DTYPES`.
          platform: `tpu`, `gpu` or `cpu`, whose attention kernel may have wider pages; None for no kernel.

        Raises:
          ValueError: for a mesh that does not divide an axis, or that the engine has no steps for; for an unknown
            format or dtype.
        """
        config, dtype = shapes.config, float_of(platform)
        rounding = rounding_of(weights, kv)
        others = [axis for axis in ("stage", "expert", "sequence") if getattr(mesh, axis) > 1]
        if others:
            raise ValueError(
                f"mesh {mesh}: size counts data and tensor shards, not yet over {others[0]}; leave it at 1"
            )
        sharding = Sharding(mesh.abstract(), config.units)
        sums = dict.fromkeys(("all", "dense", "expert"), 0)
        token_flops = row_flops = 0.0
        for name, spec, count in shapes.parameters:
            leaves = list(_leaves(name, spec, dtype, rounding, sharding))
            nbytes = count * sum(math.prod(shape) * itemsize for shape, itemsize in leaves)
            sums["all"] += nbytes
            if name == "embed.weight" and not config.tied:
                continue
            is_expert = "experts" in spec.axes
            sums["expert" if is_expert else "dense"] += nbytes
            if len(spec.shape) < 2:
                continue
            local = sharding.named(spec.axes, name).shard_shape(spec.shape)
            flops = 2.0 * count * math.prod(local)
            if name in ("embed.weight", "head.weight"):
                row_flops += flops
            elif is_expert and config.experts:
                token_flops += flops * config.experts.per_token / config.experts.count
            else:
                token_flops += flops
        return cls(
            config=config,
            tensor=mesh.tensor,
            weight_bytes=sums["all"],
            dense_bytes=sums["dense"],
            expert_bytes=sums["expert"],
            token_flops=token_flops,
            row_flops=row_flops,
            kv_bytes=_kv_bytes(config, config.kv_heads_of_shard(mesh.tensor), kv, platform),
            layers=tuple(collections.Counter(window or math.inf for window in config.windows).items()),
            float_bytes=dtype.itemsize,
            integer=rounding is not None and rounding.act == (8, None),
        )

    def context_bytes(self, tokens: float) -> float:
        """Keys and values of a sequence of so many tokens: layers with a window hold no more than that."""
        return self.kv_bytes * sum(count * min(tokens, window) for window, count in self.layers)

    def read_bytes(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads: of E experts, k a token, E(1-(1-k/E)^tokens) are touched."""
        experts = self.config.experts
        if experts is None:
            return self.dense_bytes
        untouched = (1 - experts.per_token / experts.count) ** tokens
        return self.dense_bytes + self.expert_bytes * (1 - untouched)

    def attention_flops(self, start: int, length: int) -> float:
        """Scores and sums of values of so many tokens from position `start` on, each seeing those before it."""
        whole = length * (start + (length + 1) / 2)  # pairs of a token and one that it sees
        pairs = sum(count * min(whole, length * window) for window, count in self.layers)
        return 4 * pairs * self.config.q_width / self.tensor

    @functools.cached_property
    def layer_rows(self) -> float:
        """Rows of the model's width that are summed over the tensor axis for each token of a step.

        One after attention, one after the feed-forward part (experts are summed before they are weighed, so each of a
        token's experts is a row), one for the embedding.
        """
        config = self.config
        parts = [
            1 + (config.experts.per_token if config.experts and config.has_experts(layer) else 1)
            for layer in range(config.num_layers)
        ]
        return 1 + sum(parts)

    def temporary_bytes(self, rows: int, tokens: int) -> int:
        """A guess at what a step needs beside weights and cache: activations of one layer, and logits with a copy."""
        config = self.config
        width = 4 * config.d_model + (2 * config.d_ff + config.q_width + 2 * config.kv_width) // self.tensor
        return self.float_bytes * tokens * width + 2 * 4 * rows * config.vocab_size


def _kv_bytes(config: ModelConfig, heads: int, kv: str, platform: str | None) -> int:
    """Of a token in one layer, as the engine keeps it."""
    dtype = float_of(platform) if kv == FLOAT else jnp.dtype(kv)
    empty = functools.partial(
        init_pages, 1, _PAGE, heads, config.head_dim, dtype,
        kernel=platform is not None, sinks=config.attention_sinks, platform=platform,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pages are wider, or no kernel serves: the bytes say so
        pages = jax.eval_shape(empty)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)) // _PAGE


def float_of(platform: str | None) -> jnp.dtype:
    """In which floats a model is loaded there."""
    return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)


def rounding_of(weights: str, kv: str) -> Format | None:
    """The format of weights; None for bfloat16.

    Raises:
      ValueError: for one that is unknown, or an unknown dtype of keys and values.
    """
    if kv not in KV_DTYPES:
        raise ValueError(f"{kv=} is unknown; keys and values are {' or '.join(KV_DTYPES)}")
    return None if weights == FLOAT else quantization_format(weights)


def _leaves(
    name: str, spec: ParamSpec, dtype: jnp.dtype, rounding: Format | None, sharding: Sharding
) -> Iterator[tuple[Sequence[int], int]]:
    """Shape and bytes a number of each array that one device has of a parameter."""
    weight: QArray | jax.ShapeDtypeStruct = jax.ShapeDtypeStruct(spec.shape, dtype)
    if rounding is not None and quantizable(name, spec.shape):
        rounding.check(spec.shape[-1], name)
        weight = rounding.shapes(spec.shape)
    where = shardings(spec, weight, sharding, name)
    for leaf, place in zip(jax.tree.leaves(weight), jax.tree.leaves(where), strict=True):
        yield place.shard_shape(leaf.shape), jnp.dtype(leaf.dtype).itemsize
