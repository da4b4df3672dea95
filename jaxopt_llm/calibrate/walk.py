"""`walk`: layer by layer through a model, each seeing what the changed ones before it give."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm.calibrate.method import LayerWeights, Method
from jaxopt_llm.calibrate.resume import Finished
from jaxopt_llm.calibrate.statistics import Statistics, Wants, watch
from jaxopt_llm.models import Batch, Rope, Transformer, weights, with_weights
from jaxopt_llm.models.rope import rotation

_TOKENS = 4096  # that go through a layer at once, at most, if a sequence is not longer

Progress = Callable[[int, int], None]


def walk(
    model: Transformer,
    ids: Int[np.ndarray, "N T"],
    methods: Sequence[Method],
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """A copy of a model whose layers went through methods, one layer after another.

    The hidden states of all sequences before one layer are held on the host, and nothing else of the text. With a
    `directory`, and a model that was loaded with `offload`, a CPU holds the weights of one layer: those before it,
    changed, and those after it lie on disk.

    Args:
      model: the original, which stays as it is; embedding, final norm and head are shared with it.
      ids: the calibration text, N sequences of T tokens.
      methods: each layer goes through all of them, in their order.
      directory: where finished layers are kept: a walk that was interrupted goes on after the last of them. What is
        returned may be mapped from there, and can still be used when the directory is gone.
      progress: called with (layers done, of all).

    Raises:
      ValueError: for ids outside the vocabulary or sequences beyond the context, for statistics that are no numbers
        (the message names the product), or if the walk in `directory` is another.
    """
    config = model.config
    check_ids(model, ids)
    finished = None if directory is None else Finished(directory, model, ids, methods)
    hidden = np.asarray(model.embedded(jnp.asarray(ids)))
    hidden = hidden if hidden.flags.writeable else hidden.copy()
    for layer in range(config.num_layers):
        done = finished.read(layer) if finished else None
        if done is None:
            done = layer_weights(_through_methods(model, layer, hidden, methods), layer)
            if finished:
                done = finished.write(layer, done)
        model = _with_layer(model, layer, done)
        if layer + 1 < config.num_layers:
            _advance(model, layer, hidden)
        if progress:
            progress(layer + 1, config.num_layers)
    return model


def layer_weights(model: Transformer, layer: int) -> dict[str, Any]:
    """The parameters of a layer by their names in it."""
    return weights(model.layers[layer])


def through(model: Transformer, layer: int, hidden: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    """The hidden states after a layer, of those before it."""
    return _program(model, layer)(_outputs, hidden)


def check_ids(model: Transformer, ids: Int[np.ndarray, "N T"]) -> None:
    """Raises ValueError for ids outside a model's vocabulary, or sequences beyond its context."""
    config = model.config
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} lies outside the vocabulary of {config.vocab_size}")
    if ids.shape[1] > config.max_seq_len:
        raise ValueError(
            f"calibration sequences of {ids.shape[1]} tokens are longer than the model's context of "
            f"{config.max_seq_len}; take length={config.max_seq_len}"
        )


def _through_methods(
    model: Transformer, layer: int, hidden: Float[np.ndarray, "N T D"], methods: Sequence[Method]
) -> Transformer:
    for method in methods:
        for wants in method.wants(model.config, layer):
            statistics = _observe(model, layer, hidden, wants)
            changed = method.apply(model.config, layer, layer_weights(model, layer), statistics)
            model = _with_layer(model, layer, changed)
    return model


def _with_layer(model: Transformer, layer: int, values: LayerWeights) -> Transformer:
    return with_weights(model, {f"layers.{layer}.{name}": value for name, value in values.items()})


def _observe(
    model: Transformer, layer: int, hidden: Float[np.ndarray, "N T D"], wants: Wants
) -> dict[str, Statistics]:
    """The statistics of every product that is wanted, over all sequences.

    Raises:
      ValueError: if one has a number that is none.
    """
    run = _program(model, layer)
    total: Mapping[str, Statistics] | None = None
    for rows in _chunks(hidden):
        total = run(_statistics, jnp.asarray(hidden[rows]), total, wants=wants)
    assert total is not None, "there is at least one sequence"
    for name, found in total.items():
        if not found.is_finite:
            raise ValueError(
                f"the input of layers.{layer}.{name} is not finite on the calibration text; load the model in a dtype "
                "of a wider range, such as float32"
            )
    return wants.share(total)


def _advance(model: Transformer, layer: int, hidden: Float[np.ndarray, "N T D"]) -> None:
    """Hidden states before a layer become those after it, in place."""
    for rows in _chunks(hidden):
        hidden[rows] = through(model, layer, jnp.asarray(hidden[rows]))


def _chunks(hidden: Float[np.ndarray, "N T D"]) -> Iterator[slice]:
    """Sequences that go through a layer at once; equally many each time, so that one program serves all."""
    count, length, _ = hidden.shape
    most = max(1, _TOKENS // length)
    size = next(size for size in range(min(most, count), 0, -1) if count % size == 0)
    return (slice(start, start + size) for start in range(0, count, size))


def _program(model: Transformer, layer: int) -> Callable[..., Any]:
    """Calls a compiled function with a layer; layers of one shape share what is compiled."""
    graph, params = nnx.split(model.layers[layer])
    rope, width = model.config.layer_rope(layer), model.config.head_dim
    return lambda function, *args, **static: function(graph, rope, width, params, *args, **static)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="wants")
def _statistics(
    graph: nnx.GraphDef,
    rope: Rope,
    head_dim: int,
    params: Any,
    x: Float[Array, "B T D"],
    total: dict[str, Statistics] | None,
    *,
    wants: Wants,
) -> dict[str, Statistics]:
    """Statistics of these sequences, added to a total; what comes after the last product seen is not computed."""
    layer = nnx.merge(graph, params)
    seen = watch(layer, wants)
    _forward(layer, rope, head_dim, x)
    return seen if total is None else {name: total[name] + found for name, found in seen.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _outputs(
    graph: nnx.GraphDef, rope: Rope, head_dim: int, params: Any, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    return _forward(nnx.merge(graph, params), rope, head_dim, x)


def _forward(layer: Any, rope: Rope, head_dim: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    batch = Batch.dense(jnp.zeros(x.shape[:2], jnp.int32))  # a layer reads positions, not tokens
    turn = rotation(rope, head_dim, batch.positions)
    out, _ = layer(x.reshape(-1, x.shape[-1]), turn, batch, None)
    return out.reshape(x.shape)
