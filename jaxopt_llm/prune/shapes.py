"""`Shape`: how large a pruned model is to be, given or found for a number of parameters."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxopt_llm.models import ModelConfig, Transformer, specs
from jaxopt_llm.prune.surgery import layer_of, logical_axes

Axis = Literal["mlp", "heads", "embed", "layers"]

_FIELDS: Mapping[str, str] = {
    "mlp": "d_ff",
    "heads": "num_heads",
    "embed": "d_model",
    "layers": "num_layers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a pruned model, named as in `ModelConfig`; None leaves one as it is."""

    d_model: int | None = None
    d_ff: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None

    def resolve(self, config: ModelConfig, multiple: int = 1) -> dict[str, int]:
        """Every size of the pruned model, by its name here.

        Args:
          config: of the model to prune.
          multiple: divides `d_model` and `d_ff` where they are cut; 128 suits a TPU's matrix unit.

        Raises:
          ValueError: for a size beyond the model's, one that `multiple` does not divide, or heads that key/value
            groups do not share evenly.
        """
        sizes = {}
        for name, size in dataclasses.asdict(self).items():
            whole = getattr(config, name)
            sizes[name] = whole if size is None else size
            if not 1 <= sizes[name] <= whole:
                raise ValueError(f"{name}={size} must lie between 1 and the model's {whole}")
            if sizes[name] != whole and name in ("d_model", "d_ff") and sizes[name] % multiple:
                near = max(1, round(sizes[name] / multiple)) * multiple
                raise ValueError(f"{name}={size} must be a multiple of {multiple}; try {name}={near}")
        if config.experts and sizes["d_ff"] != config.d_ff:
            raise ValueError(
                f"d_ff={self.d_ff}: {config.family} has experts, whose channels are not cut; leave it"
            )
        _check_heads(sizes["num_heads"], sizes["num_kv_heads"], config.num_heads // config.num_kv_heads)
        return sizes


def fit(
    model: Transformer,
    target_params: float,
    *,
    axes: Sequence[Axis] = ("mlp", "heads"),
    multiple: int = 8,
) -> Shape:
    """The shape that keeps a share of a model's parameters, of those outside the embedding and the head.

    Of all shapes that fill the share and do not pass it, the one that cuts all axes most evenly. Every key/value group
    stays, and loses as many query heads as the others (arXiv:2407.14679); where each has one, groups go. The number of
    heads divides the model width: transformers 5 refuses other configs of some families, whatever their head width.

    Args:
      model: the model to prune.
      target_params: the share, between 0 and 1.
      axes: what may be cut: feed-forward channels, query heads, the model width, whole layers.
      multiple: divides the feed-forward channels and the model width.

    Raises:
      ValueError: for a share outside (0, 1), an unknown axis, or a share that the axes cannot reach.
    """
    _check_request(model.config, target_params, axes)
    grouped = model.config.num_heads > model.config.num_kv_heads
    whole: dict[str, int] = {axis: getattr(model.config, _FIELDS[axis]) for axis in axes}
    each: dict[str, int] = {
        "heads": model.config.num_kv_heads if grouped else 1,
        "embed": math.lcm(multiple, model.config.num_heads),
        "layers": 1,
    }
    step: dict[str, int] = {axis: each.get(axis, multiple) for axis in axes}
    *coarse, fine = sorted(axes, key=lambda axis: whole[axis] // step[axis])
    choices = [np.arange(step[axis], whole[axis] + 1, step[axis]) / whole[axis] for axis in coarse]
    shares: dict[str, Any] = dict(zip(coarse, np.ix_(*choices), strict=True))
    terms = _terms(model)
    least, most = (_count(terms, shares | {fine: share}) for share in (0.0, 1.0))  # linear in between
    wanted = (target_params * _count(terms, {}) - least) / (most - least)
    steps = np.clip(np.floor(wanted * whole[fine] / step[fine] + 1e-9), 0, whole[fine] // step[fine])
    shares[fine] = steps * step[fine] / whole[fine]
    every = np.stack(np.broadcast_arrays(*shares.values()))
    fits = every.all(0) & _heads_divide_width(model.config, shares)
    if not fits.any():
        raise ValueError(
            f"{target_params=} cannot be reached by cutting {', '.join(axes)} alone; name more axes or keep more"
        )
    unevenness = np.divide(every.max(0), every.min(0), out=np.full(fits.shape, math.inf), where=fits)
    best = every[:, *np.unravel_index(unevenness.argmin(), unevenness.shape)]
    sizes = {_FIELDS[axis]: round(share * whole[axis]) for axis, share in zip(shares, best, strict=True)}
    if "num_heads" in sizes and not grouped:
        sizes["num_kv_heads"] = sizes["num_heads"]
    return Shape(**sizes)


def body_params(model: Transformer) -> int:
    """Parameters outside the embedding and the head."""
    return round(_count(_terms(model), {}))


def _check_heads(heads: int, groups: int, most: int) -> None:
    each, rest = divmod(heads, groups)
    if rest or each > most:
        fits = groups * min(max(each, 1), most)
        raise ValueError(
            f"num_heads={heads} must be a multiple of num_kv_heads={groups}, with at most {most} query heads for each "
            f"of them; try num_heads={fits}, or another num_kv_heads"
        )


def _check_request(config: ModelConfig, target_params: float, axes: Sequence[Axis]) -> None:
    if not 0 < target_params < 1:
        raise ValueError(f"target_params={target_params} must lie between 0 and 1: the share that stays")
    if not axes or set(axes) - set(get_args(Axis)):
        raise ValueError(f"axes={tuple(axes)} must be some of {', '.join(get_args(Axis))}")
    if config.experts and "mlp" in axes:
        raise ValueError(
            f"axes={tuple(axes)}: {config.family} has experts, whose channels are not cut; leave out mlp"
        )


def _heads_divide_width(config: ModelConfig, shares: Mapping[str, Any]) -> Any:
    width = np.round(shares.get("embed", 1.0) * config.d_model)
    heads = np.round(shares.get("heads", 1.0) * config.num_heads)
    return width % np.maximum(heads, 1) == 0


def _terms(model: Transformer) -> Mapping[tuple[str, ...], int]:
    """How many parameters there are along each set of axes; embedding and head apart."""
    terms: collections.Counter[tuple[str, ...]] = collections.Counter()
    alone = model.config.num_heads == model.config.num_kv_heads  # then groups go with their heads
    for name, spec in specs(model).items():
        axes = [axis for axis in logical_axes(name, spec) if axis is not None]
        if "vocab" in axes:
            continue
        axes = ["heads" if alone and axis == "kv_heads" else axis for axis in axes]
        terms[(*axes, *(["layers"] if layer_of(name) is not None else []))] += math.prod(spec.shape)
    return terms


def _count(terms: Mapping[tuple[str, ...], int], shares: Mapping[str, Any]) -> Any:
    """The parameters of a model with these shares of its axes, all of the others."""
    return sum(size * math.prod(shares.get(axis, 1.0) for axis in axes) for axes, size in terms.items())
