"""Some weights of a model in one safetensors file: what a long job has finished so far."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_llm.checkpoints import safetensors
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.kernels import QArray, Weight

_LEAVES = ("data", "scale", "bias")
_STATIC = tuple(field.name for field in dataclasses.fields(QArray) if field.name not in _LEAVES)


def write_weights(path: str | os.PathLike[str], weights: Mapping[str, Weight]) -> None:
    """Writes weights, quantized or not, to a file that appears whole or not at all.

    A quantized one is the tensors NAME.data, NAME.scale and NAME.bias; what it is beside them stands in the
    file's metadata.
    """
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for name, weight in weights.items():
        if isinstance(weight, QArray):
            leaves = {leaf: getattr(weight, leaf) for leaf in _LEAVES}
            tensors |= {f"{name}.{key}": np.asarray(leaf) for key, leaf in leaves.items() if leaf is not None}
            metadata[name] = json.dumps({key: getattr(weight, key) for key in _STATIC})
        else:
            tensors[name] = np.asarray(weight)
    with atomic_file(path) as file:
        specs = [(name, array.shape, array.dtype, array) for name, array in tensors.items()]
        safetensors.write_file(file, specs, metadata)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Weight]:
    """The weights that `write_weights` wrote.

    Raises:
      CheckpointError: if the file is damaged.
    """
    with safetensors.open_file(path) as source:
        arrays = {name: jnp.asarray(tensor.read()) for name, tensor in source.items()}
        quantized = {name: _static(json.loads(text)) for name, text in source.metadata.items()}
    weights: dict[str, Weight] = {}
    for name, static in quantized.items():
        leaves: dict[str, Any] = {leaf: arrays.pop(f"{name}.{leaf}", None) for leaf in _LEAVES}
        weights[name] = QArray(**leaves, **static)
    return arrays | weights


def _static(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
