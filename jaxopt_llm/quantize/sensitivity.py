"""What rounding one matrix alone costs: the model's KL divergence from itself, matrix by matrix, format by format."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm.calibrate.resume import origin, refuse_another
from jaxopt_llm.calibrate.walk import check_ids, through
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.kernels import Format, QArray, quantization_format
from jaxopt_llm.models import Transformer, quantizable, weights, with_weights, without_layers

_ROWS = 64  # of logits that exist at once

Losses = dict[str, dict[str, float]]
"""Of each matrix the KL divergence, nats a token, that each format brings."""
Progress = Callable[[int, int], None]


def sensitivities(
    model: Transformer,
    ids: Int[np.ndarray, "N T"],
    formats: Sequence[str],
    *,
    path: Path | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Measures every matrix in every format whose groups divide it, all others as they are.

    What a layer before the rounded matrix gives is computed once for all; each figure takes the layers from there on.

    Args:
      model: the original, which stays as it is.
      ids: the calibration text, N sequences of T tokens.
      formats: names; with float activations, since the weights alone are measured.
      path: a JSON file of what was measured, read first and kept up to date: a run that was interrupted goes on, and
        a later one measures only formats that are new.
      progress: called with (figures there, of all).

    Raises:
      ValueError: for an unknown format or one that rounds activations, a matrix that none of them fits, ids that do not
        suit the model, a divergence that is no number, or a `path` of another model or text.
    """
    chosen = _weights_alone(formats)
    check_ids(model, ids)
    kept = _Kept(path, model, ids)
    wanted = [
        (name, format)
        for name, value in weights(model).items()
        if quantizable(name, value.shape)
        for format in _fitting(chosen, name, value.shape[-1])
    ]
    probe, found = _Probe(model, ids), Losses()
    for done, (name, format) in enumerate(wanted, start=1):
        if format not in kept.losses.setdefault(name, {}):
            kept.losses[name][format] = probe.loss(name, chosen[format])
            kept.write()
        found.setdefault(name, {})[format] = kept.losses[name][format]
        if progress:
            progress(done, len(wanted))
    return found


def _weights_alone(formats: Sequence[str]) -> dict[str, Format]:
    chosen = {name: quantization_format(name) for name in formats}
    for name, format in chosen.items():
        if format.act is not None:
            raise ValueError(
                f"{name} rounds activations too; measure a format of weights alone, such as int8_g32"
            )
    return chosen


def _fitting(chosen: dict[str, Format], name: str, width: int) -> list[str]:
    fitting = [format for format, own in chosen.items() if width % (own.group or width) == 0]
    if not fitting:
        raise ValueError(
            f"{name} has {width} input features, which no group of {', '.join(chosen)} divides; add int8"
        )
    return fitting


class _Kept:
    """Figures, and the file that keeps them."""

    def __init__(self, path: Path | None, model: Transformer, ids: Int[np.ndarray, "N T"]):
        self.path, self.losses = path, Losses()
        if path is None:
            return
        self.origin = origin(model, ids)
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            refuse_another(path, there, self.origin)
            self.losses = there["losses"]

    def write(self) -> None:
        """The file anew: whole or not at all."""
        if self.path is not None:
            with atomic_file(self.path) as file:
                file.write(json.dumps(self.origin | {"losses": self.losses}, indent=1).encode())


class _Probe:
    """A model, and its hidden states before each layer and after the last."""

    def __init__(self, model: Transformer, ids: Int[np.ndarray, "N T"]):
        self.model, self.ids, self.weights = model, jnp.asarray(ids), weights(model)
        states = [model.embedded(self.ids)]
        for layer in range(model.config.num_layers):
            states.append(through(model, layer, states[-1]))
        self.states = jax.device_get(states)
        _, self.top = nnx.split(without_layers(model))

    def loss(self, name: str, format: Format) -> float:
        """What rounding one matrix costs."""
        value = self.weights[name]
        floats = value.dequantize() if isinstance(value, QArray) else value
        rounded = format.quantize(floats).dequantize(floats.dtype)
        changed = with_weights(self.model, {name: rounded})
        graph, params = nnx.split(without_layers(changed))
        found = float(_kld(graph, params, self.top, self._after(changed, name), self.states[-1]))
        if not np.isfinite(found):
            raise ValueError(
                f"the KL divergence with {name} rounded is {found}; load the model in a dtype of a wider range, "
                "such as float32"
            )
        return found

    def _after(self, changed: Transformer, name: str) -> Float[Array, "N T D"]:
        """The hidden states after the last layer, with this matrix changed."""
        last = changed.config.num_layers
        start = _layer_that_reads(name, last)
        hidden = jnp.asarray(self.states[start]) if start else changed.embedded(self.ids)
        for layer in range(start, last):
            hidden = through(changed, layer, hidden)
        return hidden


def _layer_that_reads(name: str, last: int) -> int:
    """The first layer whose result depends on a parameter; one after the last for the head."""
    match name.split("."):
        case "layers", number, *_:
            return int(number)
        case "head", *_:
            return last
    return 0


@functools.partial(jax.jit, static_argnums=0)
def _kld(
    graph: nnx.GraphDef,
    params: Any,
    reference_params: Any,
    hidden: Float[Array, "N T D"],
    reference: Float[Array, "N T D"],
) -> Float[Array, ""]:
    """The mean over tokens."""
    ours, theirs = (nnx.merge(graph, own) for own in (params, reference_params))
    logprobs = lambda top, x: jax.nn.log_softmax(top.logits(top.final_norm(x)))

    def token(pair: tuple[Float[Array, "D"], Float[Array, "D"]]) -> Float[Array, ""]:
        logq, logp = logprobs(ours, pair[0]), logprobs(theirs, pair[1])
        return jnp.sum(jnp.exp(logp) * (logp - logq))

    rows = lambda x: x.reshape(-1, x.shape[-1])
    return jax.lax.map(token, (rows(hidden), rows(reference)), batch_size=_ROWS).mean()
