"""Hugging Face directories that transformers loads."""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_llm.checkpoints import safetensors
from jaxopt_llm.checkpoints.atomic import atomic_directory
from jaxopt_llm.checkpoints.files import TensorSpec
from jaxopt_llm.checkpoints.floats import to_floats
from jaxopt_llm.checkpoints.hf import CONFIG
from jaxopt_llm.kernels import Weight
from jaxopt_llm.models import ModelConfig, Transformer, weights
from jaxopt_llm.models.families import family, parse_config, write_config
from jaxopt_llm.models.family import Source
from jaxopt_llm.text import Tokenizer


def export(model: Transformer, tokenizer: Tokenizer | None, target: str | Path) -> None:
    """Writes config.json, safetensors and the tokenizer, whole or not at all.

    Quantized weights are written as the floats they stand for: transformers reads the model like any other.

    Raises:
      ValueError: if transformers' config cannot say all that the model's does.
      OSError: if `target` is something else than a checkpoint, or the disk is full.
    """
    config = write_config(model.config, str(model.dtype))
    _refuse_if_lost(model.config, config)
    with atomic_directory(target, marker=CONFIG) as directory:
        safetensors.write(directory, _tensors(model), {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(directory)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse_if_lost(config: ModelConfig, written: Mapping[str, Any]) -> None:
    """Raises ValueError if a reader of what is written would take it for another model."""
    read = parse_config(written)
    names = [field.name for field in dataclasses.fields(config)]
    lost = [name for name in names if _rounded(getattr(config, name)) != _rounded(getattr(read, name))]
    if lost:
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(f"transformers' {config.family} models cannot have {settings}; keep our own format")


def _rounded(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value


def _tensors(model: Transformer) -> list[TensorSpec]:
    kind = family(model.config.family)
    sources: dict[str, list[tuple[Source, Weight]]] = defaultdict(list)
    for name, value in weights(model).items():
        source = kind.source(name)
        sources[source.name].append((source, value))
    result: list[TensorSpec] = []
    for name, parts in sources.items():
        source, value = parts[0]
        if "{e}" in name:
            for e in range(value.shape[0]):
                make = functools.partial(_expert, value, e, model.dtype)
                result.append((name.replace("{e}", str(e)), value.shape[1:], model.dtype, make))
        else:
            shape = (
                (value.shape[0], len(parts) * value.shape[1], *value.shape[2:])
                if source.part
                else value.shape
            )
            shape = (*shape[:-2], shape[-1], shape[-2]) if source.transposed else shape
            result.append((name, shape, model.dtype, functools.partial(_fused, parts, model.dtype)))
    return result


def _expert(value: Weight, index: int, dtype: jnp.dtype) -> np.ndarray:
    return to_floats(value[index], dtype)


def _fused(parts: list[tuple[Source, Weight]], dtype: jnp.dtype) -> np.ndarray:
    source, value = parts[0]
    whole = to_floats(value, dtype)
    if source.part:
        whole = np.empty((value.shape[0], len(parts) * value.shape[1], *value.shape[2:]), dtype)
        for part, weight in parts:
            assert part.part
            whole[:, part.part[0] :: part.part[1]] = to_floats(weight, dtype)
    return np.ascontiguousarray(whole.swapaxes(-1, -2)) if source.transposed else whole
