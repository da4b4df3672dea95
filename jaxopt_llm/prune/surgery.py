"""Taking parts out of a model, so that a smaller dense one is left."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import ModelConfig, ParamSpec, Transformer, from_params, specs, weights

Indices = Int[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a model, by ascending indices; None for all.

    Attributes:
      layers: of the layers.
      embed: of the model width, the same for everything that reads or writes the residual stream.
      heads: of the query heads, an entry for each layer that stays. As many of each key/value group, or none:
        a group without any goes too.
      mlp: of the feed-forward channels, an entry for each layer that stays.
    """

    layers: Sequence[int] | None = None
    embed: Sequence[int] | None = None
    heads: Sequence[Sequence[int]] | None = None
    mlp: Sequence[Sequence[int]] | None = None


def cut(model: Transformer, kept: Kept) -> Transformer:
    """A smaller dense model of the parts that stay, its config in accord: other readers load it as any other.

    It computes what the whole model does with the other parts set to zero and every norm over what stays.

    Args:
      model: with float weights, of any family; it stays as it is.
      kept: what stays.

    Raises:
      ValueError: for quantized weights, indices that the model lacks or that are not ascending, key/value groups of
        unequal size, or feed-forward channels of a model with experts.
    """
    floats = float_weights(model)
    parts = _Parts.of(model.config, kept)
    values = {
        parts.renamed(name): _taken(value, parts.of_each_axis(name, spec))
        for (name, spec), value in zip(specs(model).items(), floats.values(), strict=True)
        if parts.keep(name)
    }
    if model.config.scale_embedding:
        values |= _rescaled(values, model.config, parts.config)
    return from_params(parts.config, values, dtype=model.dtype)


def logical_axes(name: str, spec: ParamSpec) -> tuple[str | None, ...]:
    """Of a parameter; to the sharding rules a norm over the model width has none, to the scalpel it has."""
    over_width = name.endswith("norm.weight") and name.split(".")[-2] not in ("q_norm", "k_norm")
    return ("embed",) if over_width else spec.axes


def layer_of(name: str) -> int | None:
    """The layer that a parameter belongs to."""
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class _Parts:
    """`Kept`, checked and filled in: what stays of each logical axis, in whole units of it.

    Attributes:
      whole: the config of the model to cut.
      config: that of the result.
      places: of each layer that stays, its new index.
      common: what stays of axes that all layers share.
      layered: what stays of axes that differ from layer to layer; by new index.
    """

    whole: ModelConfig
    config: ModelConfig
    places: Mapping[int, int]
    common: Mapping[str, Indices]
    layered: Mapping[str, Sequence[Indices]]

    @classmethod
    def of(cls, config: ModelConfig, kept: Kept) -> "_Parts":
        if config.experts and kept.mlp is not None:
            raise ValueError(f"mlp: {config.family} has experts, whose channels are not cut; leave mlp=None")
        layers = _checked("layers", kept.layers, config.num_layers)
        embed = _checked("embed", kept.embed, config.d_model)
        heads = list(_each("heads", kept.heads, len(layers), config.num_heads))
        mlp = list(_each("mlp", kept.mlp, len(layers), config.d_ff))
        groups = [_groups(each, config.num_heads // config.num_kv_heads) for each in heads]
        for name, rows in (("heads", heads), ("key/value groups", groups), ("mlp", mlp)):
            if len(counts := sorted({len(row) for row in rows})) > 1:
                raise ValueError(f"{name}: layers keep {counts}; a config has one number for all of them")
        small = dataclasses.replace(
            config,
            d_model=len(embed),
            d_ff=len(mlp[0]),
            num_heads=len(heads[0]),
            num_kv_heads=len(groups[0]),
            num_layers=len(layers),
            windows=tuple(config.windows[i] for i in layers),
            experts=config.experts
            and dataclasses.replace(config.experts, layers=tuple(config.experts.layers[i] for i in layers)),
        )
        places = {int(old): new for new, old in enumerate(layers)}
        return cls(config, small, places, {"embed": embed}, {"heads": heads, "kv_heads": groups, "mlp": mlp})

    def keep(self, name: str) -> bool:
        return (layer := layer_of(name)) is None or layer in self.places

    def renamed(self, name: str) -> str:
        layer = layer_of(name)
        return name if layer is None else name.replace(f"layers.{layer}.", f"layers.{self.places[layer]}.", 1)

    def of_each_axis(self, name: str, spec: ParamSpec) -> Iterator[Indices | None]:
        """The rows that stay along each axis of a parameter, None for all: a head is several rows."""
        layer = layer_of(name)
        own = {} if layer is None else {axis: each[self.places[layer]] for axis, each in self.layered.items()}
        for axis, size in zip(logical_axes(name, spec), spec.shape, strict=True):
            units = (own | dict(self.common)).get(axis or "")
            if units is None or axis is None:
                yield None
            else:
                rows = size // self.whole.units[axis]
                yield (units[:, None] * rows + np.arange(rows)).reshape(-1)


def float_weights(model: Transformer) -> dict[str, Array]:
    """Every parameter's value under its name.

    Raises:
      ValueError: for a quantized one.
    """
    floats = {}
    for name, value in weights(model).items():
        if isinstance(value, QArray):
            raise ValueError(f"{name} is quantized; prune the float model, then quantize what is left")
        floats[name] = value
    return floats


def _checked(name: str, indices: Sequence[int] | None, size: int) -> Indices:
    if indices is None:
        return np.arange(size)
    result = np.asarray(indices, np.int64)
    if not result.size:
        raise ValueError(f"{name}: nothing would be left; keep at least one of {size}")
    if result[0] < 0 or result[-1] >= size or (np.diff(result) <= 0).any():
        raise ValueError(f"{name}={result.tolist()} must be ascending indices below {size}")
    return result


def _each(name: str, rows: Sequence[Sequence[int]] | None, layers: int, size: int) -> Iterator[Indices]:
    if rows is not None and len(rows) != layers:
        raise ValueError(f"{name} has entries for {len(rows)} layers; {layers} stay, and each needs one")
    for i in range(layers):
        yield _checked(f"{name}[{i}]", None if rows is None else rows[i], size)


def _groups(heads: Indices, group: int) -> Indices:
    """The key/value heads that these query heads read."""
    groups, counts = np.unique(heads // group, return_counts=True)
    if len(set(counts)) > 1:
        raise ValueError(
            f"heads={heads.tolist()} leave key/value groups of {sorted(set(counts.tolist()))} query heads; "
            "keep as many in each, or none"
        )
    return groups


def _taken(value: Array, rows: Iterator[Indices | None]) -> Array:
    for axis, kept in enumerate(rows):
        if kept is not None and len(kept) < value.shape[axis]:
            value = jnp.take(value, jnp.asarray(kept, jnp.int32), axis=axis)
    return value


def _rescaled(
    values: Mapping[str, Array], whole: ModelConfig, small: ModelConfig
) -> dict[str, Float[Array, "..."]]:
    """Embeddings are multiplied by the root of the model width, which is another now; a tied head is not."""
    scale = math.sqrt(whole.d_model / small.d_model)
    grown = {"embed.weight": _scaled(values["embed.weight"], scale)}
    if small.tied:
        gain = values["final_norm.weight"]
        grown["final_norm.weight"] = _scaled(gain + small.norm_offset, 1 / scale) - small.norm_offset
    return grown


def _scaled(value: jax.Array, by: float) -> jax.Array:
    return (value.astype(jnp.float32) * by).astype(value.dtype)
