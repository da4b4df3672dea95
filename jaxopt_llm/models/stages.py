"""A model whose layers lie on several meshes: the stages of a pipeline."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxopt_llm.kernels.formats import Format
from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.params import abstract, num_bytes
from jaxopt_llm.models.transformer import Transformer
from jaxopt_llm.sharding import balanced


def stages(model: Transformer) -> list[Transformer]:
    """The parts of a model that lie together, in their order; only the model where all of it does.

    Each has some of the layers, the first of them the embedding too, the last one final norm and head. Where the head
    is the embedding, the last part has a copy of that. All else is shared with the model.
    """
    runs = _runs(model)
    if len(runs) == 1:
        return [model]
    return [_part(model, run, first=run is runs[0], last=run is runs[-1]) for run in runs]


def num_stages(model: Transformer) -> int:
    """How many parts a model lies in."""
    return len(_runs(model))


def stage_layers(
    config: ModelConfig, count: int, dtype: jnp.dtype = jnp.float32, rounding: Format | None = None
) -> tuple[int, ...]:
    """How many layers so many stages have, so that a step of decoding takes each about as long.

    What a step reads stands for its time: all of a layer and of the head, next to nothing of the embedding.

    Args:
      config: of the model.
      count: of stages.
      dtype, rounding: of its weights, as `abstract` has them.

    Raises:
      ValueError: for more stages than layers.
    """
    model = abstract(config, dtype, rounding)
    head = model.embed if config.tied else model.head
    return balanced([num_bytes(layer) for layer in model.layers], count, last=num_bytes(head))


def _runs(model: Transformer) -> list[list[int]]:
    """The layers of each stage."""
    devices = [_devices(model, layer) for layer in range(len(model.layers))]
    runs = [list(run) for _, run in itertools.groupby(range(len(devices)), devices.__getitem__)]
    if len(runs) > 1 and sum(len(devices[run[0]]) for run in runs) > len(frozenset.union(*devices)):
        raise ValueError(
            "a device has layers of several stages; load the model with a mesh, or place each stage apart"
        )
    return runs


def _devices(model: Transformer, layer: int) -> frozenset[jax.Device]:
    return frozenset(_sharding(model.layers[layer]).device_set)


def _sharding(module: nnx.Module) -> jax.sharding.Sharding:
    return jax.tree.leaves(nnx.state(module))[0].sharding


def _part(model: Transformer, layers: Sequence[int], *, first: bool, last: bool) -> Transformer:
    part = nnx.merge(*nnx.split(model))
    part.layers, part.first_layer = nnx.List([part.layers[i] for i in layers]), layers[0]
    if last and not first and part.config.tied:
        weight = part.embed.weight
        part.embed.weight = weight.replace(_beside(weight.get_value(), part.layers[0]))
    elif not first:
        del part.embed
    if not last:
        del part.final_norm
        if not part.config.tied:
            del part.head
    return part


def _beside(value: Any, module: nnx.Module) -> Any:
    """A copy of an array or its shape, split as it is, on the devices of a module's."""
    where = _sharding(module)

    def copy(leaf: Any) -> Any:
        target = NamedSharding(where.mesh, leaf.sharding.spec) if isinstance(where, NamedSharding) else where
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)
        return jax.device_put(leaf, target)

    return jax.tree.map(copy, value)
