"""Where in a model the difference to another arises."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm.models import Transformer, as_run, capture


def layer_errors(
    model: Transformer, reference: Transformer, tokens: Int[np.ndarray, "T"]
) -> Float[np.ndarray, "L"]:
    """How much each layer of a model differs from the reference's, both given what the reference's layer reads.

    A layer adds to its input; the error is the distance between what the two add over the length of what the
    reference's adds, a mean over tokens: no token's residual, however long, hides the others.

    Args:
      model, reference: of as many layers and one width.
      tokens: ids of a text that fits the context.

    Raises:
      ValueError: for models whose layers do not correspond.
    """
    if not layers_correspond(model, reference):
        raise ValueError(
            f"layers are compared of models with one number, width and vocabulary, not {_shape(model)} and "
            f"{_shape(reference)}"
        )
    graphs, params = zip(*(nnx.split(as_run(each)) for each in (model, reference)), strict=True)
    return np.asarray(_errors(graphs, params, tokens))


def layers_correspond(model: Transformer, reference: Transformer) -> bool:
    """Whether `layer_errors` can tell anything of them."""
    return _shape(model) == _shape(reference)


def _shape(model: Transformer) -> dict[str, int]:
    return {name: getattr(model.config, name) for name in ("num_layers", "d_model", "vocab_size")}


@functools.partial(jax.jit, static_argnums=0)
def _errors(
    graphs: tuple[nnx.GraphDef, ...], params: tuple[Any, ...], tokens: Int[Array, "T"]
) -> Float[Array, "L"]:
    model, reference = (nnx.merge(*parts) for parts in zip(graphs, params, strict=True))
    _, right = capture(reference, "embed", "layers.*")(tokens[None])
    given: dict[str, Array] = {}

    def put_right(name: str, x: Array) -> Array:
        given[name] = x
        return right[name]

    capture(model, replace={name: functools.partial(put_right, name) for name in right})(tokens[None])
    names = [f"layers.{i}" for i in range(model.config.num_layers)]
    scale = model.config.d_model**0.5 if model.config.scale_embedding else 1.0
    reads = [right["embed"] * jnp.asarray(scale, right["embed"].dtype), *(right[name] for name in names)]
    length = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    errors = [
        jnp.mean(length(given[name] - right[name]) / length(right[name] - x))
        for name, x in zip(names, reads, strict=False)
    ]
    return jnp.stack(errors)
