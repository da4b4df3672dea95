"""What each part of a model matters to it, measured once on a text and good for any smaller shape."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm.checkpoints import read_weights, write_weights
from jaxopt_llm.evaluate import perplexity
from jaxopt_llm.models import Batch, ModelConfig, Transformer
from jaxopt_llm.models.captured import tap
from jaxopt_llm.prune.shapes import Shape
from jaxopt_llm.prune.surgery import Kept, cut, float_weights

Depth = Literal["influence", "block", "perplexity"]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """Float32 scores of a model's parts, the larger the more they matter.

    Attributes:
      mlp: of the feed-forward channels, by what `down` reads; zeros where a layer has experts.
      heads: of the query heads, by the norm of what `o` reads.
      embed: of the features of the residual stream, by what the norms give, all of them together.
      similarity: mean cosine between the hidden states before layer i and before layer j; L stands for the end.
      perplexity: of the model without each layer; None where it was not measured.
    """

    mlp: Float[np.ndarray, "L F"]
    heads: Float[np.ndarray, "L N"]
    embed: Float[np.ndarray, "D"]
    similarity: Float[np.ndarray, "M M"]
    perplexity: Float[np.ndarray, "L"] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all."""
        fields = dataclasses.asdict(self)
        write_weights(path, {name: jnp.asarray(value) for name, value in fields.items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The scores that `save` wrote.

        Raises:
          ValueError: if the file holds something else.
        """
        arrays = {name: np.asarray(value) for name, value in read_weights(path).items()}
        known = {field.name for field in dataclasses.fields(cls)}
        if not known - {"perplexity"} <= arrays.keys() <= known:
            raise ValueError(
                f"{path} holds {sorted(arrays)}, which are no importance scores; measure them anew"
            )
        return cls(**arrays)


def importance(
    model: Transformer,
    ids: Int[np.ndarray, "N T"],
    *,
    without_layers: bool = False,
    progress: Progress | None = None,
) -> Importance:
    """Scores of a model's parts on a text, after Minitron (arXiv:2407.14679, section 2.2).

    Magnitudes are averaged over the tokens of a sequence, and the means joined over sequences by their Euclidean norm.

    Args:
      model: with float weights.
      ids: N sequences of T tokens.
      without_layers: whether the perplexity without each layer is measured too: as many passes more as layers.
      progress: called with (passes done, of all).

    Raises:
      ValueError: for quantized weights, or scores that are no numbers.
    """
    float_weights(model)
    passes = len(ids) + (model.config.num_layers if without_layers else 0)
    tell = progress or (lambda done, total: None)
    graph, params = nnx.split(model)
    total: Any = None
    for done, tokens in enumerate(ids, start=1):
        seen = _observe(graph, params, jnp.asarray(tokens))
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
        tell(done, passes)
    norms = {name: np.sqrt(np.asarray(total[name])) for name in ("mlp", "heads", "embed")}
    scores = norms | {
        "embed": norms["embed"].sum(0),
        "similarity": np.asarray(total["similarity"]) / np.float32(len(ids)),
    }
    _check_finite(scores)
    if without_layers:
        found = []
        for layer in range(model.config.num_layers):
            found.append(_perplexity_without(model, layer, ids))
            tell(len(ids) + layer + 1, passes)
        scores["perplexity"] = np.asarray(found, np.float32)
    return Importance(**scores)


def choose(scores: Importance, config: ModelConfig, shape: Shape, *, depth: Depth = "influence") -> Kept:
    """The parts that matter most, as many as a shape has.

    Args:
      scores: of the model.
      config: of the model.
      shape: of the result.
      depth: which layers go: those that change the residual stream least (`influence`, ShortGPT, arXiv:2403.03853);
        the run of neighbours over which it changes least (`block`, arXiv:2403.17887); those without which the
        perplexity is lowest (`perplexity`).

    Raises:
      ValueError: for a shape that does not fit, scores of another model, or perplexities that were not measured.
    """
    of, own = (*scores.heads.shape, len(scores.embed)), (config.num_layers, config.num_heads, config.d_model)
    if of != own:
        raise ValueError(
            f"the importance is of layers, heads and width {of}, the model has {own}; measure it on this model"
        )
    sizes = shape.resolve(config)
    layers = _layers(scores, sizes["num_layers"], depth)
    heads = [
        _heads(
            scores.heads[layer].reshape(config.num_kv_heads, -1), sizes["num_heads"], sizes["num_kv_heads"]
        )
        for layer in layers
    ]
    mlp = None if config.experts else [_top(scores.mlp[layer], sizes["d_ff"]) for layer in layers]
    return Kept(layers=layers, embed=_top(scores.embed, sizes["d_model"]), heads=heads, mlp=mlp)


def _top(scores: Float[np.ndarray, "n"], count: int) -> list[int]:
    """Indices of the highest, ascending."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def _heads(scores: Float[np.ndarray, "K g"], heads: int, groups: int) -> list[int]:
    """As many of each group as there are to be; the groups whose best matter most."""
    each = heads // groups
    best = [_top(group, each) for group in scores]
    stay = _top(np.take_along_axis(scores, np.asarray(best), axis=1).sum(1), groups)
    return [group * scores.shape[1] + head for group in stay for head in best[group]]


def _layers(scores: Importance, count: int, depth: Depth) -> list[int]:
    layers = len(scores.heads)
    gone = layers - count
    if depth == "block":
        start = int(np.diagonal(scores.similarity, gone).argmax())
        return [*range(start), *range(start + gone, layers)]
    if depth == "influence":
        return _top(1 - np.diagonal(scores.similarity, 1), count)
    if scores.perplexity is None:
        raise ValueError(
            "the perplexity without each layer was not measured; measure with without_layers=True"
        )
    return _top(scores.perplexity, count)


def _check_finite(scores: dict[str, np.ndarray]) -> None:
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"the importance of {name} is not finite on this text; load the model in a dtype of a wider range, "
                "such as float32"
            )


def _perplexity_without(model: Transformer, layer: int, ids: Int[np.ndarray, "N T"]) -> float:
    others = [i for i in range(model.config.num_layers) if i != layer]
    return perplexity(cut(model, Kept(layers=others)), ids.reshape(-1), window=ids.shape[1]).perplexity


@functools.partial(jax.jit, static_argnums=0)
def _observe(graph: nnx.GraphDef, params: Any, tokens: Int[Array, "T"]) -> dict[str, Array]:
    """Squares of each part's mean magnitude over one sequence, and the similarity of hidden states."""
    model = nnx.merge(graph, params)
    channels: dict[int, Array] = {}
    heads: list[Array] = []
    norms: list[Array] = []
    states: list[Array] = []
    for i, layer in enumerate(model.layers):
        _look(layer, lambda x, _: states.append(x))
        _look(layer.attention.o, lambda x, _: heads.append(x))
        if hasattr(layer, "mlp"):
            _look(layer.mlp.down, functools.partial(_keep, channels, i))
    _look(model.final_norm, lambda x, _: states.append(x))
    for norm in _norms_over_width(model):
        _look(norm, lambda _, y: norms.append(y))
    model.forward(Batch.dense(tokens[None]), None)
    none = jnp.zeros((len(tokens), model.config.d_ff))
    mlp = jnp.stack([channels.get(i, none) for i in range(len(heads))]).astype(jnp.float32)
    of_heads = (
        jnp.stack(heads).reshape(len(heads), len(tokens), -1, model.config.head_dim).astype(jnp.float32)
    )
    return {
        "mlp": jnp.square(jnp.abs(mlp).mean(1)),
        "heads": jnp.square(jnp.linalg.norm(of_heads, axis=-1).mean(1)),
        "embed": jnp.square(jnp.abs(jnp.stack(norms).astype(jnp.float32)).mean(1)),
        "similarity": _similarity(jnp.stack(states).astype(jnp.float32)),
    }


def _keep(where: dict[int, Array], place: int, x: Array, out: Array) -> None:
    where[place] = x


def _similarity(states: Float[Array, "M T D"]) -> Float[Array, "M M"]:
    """Mean cosine over the tokens."""
    unit = states / jnp.maximum(jnp.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
    return jnp.einsum("itd,jtd->ij", unit, unit, precision=jax.lax.Precision.HIGHEST) / states.shape[1]


def _norms_over_width(model: Transformer) -> Iterator[Any]:
    for layer in model.layers:
        for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
            if (norm := getattr(layer, name)) is not None:
                yield norm
    yield model.final_norm


def _look(part: Any, see: Callable[[Array, Any], None]) -> None:
    """Shows what a part reads and gives, which stays as it is."""

    def shown(x: Array, out: Any) -> Any:
        see(x, out)
        return out

    tap(part, shown)
