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

from jaxopt_llm.checkpoints import compressed, compressed_export, safetensors
from jaxopt_llm.checkpoints.atomic import atomic_directory
from jaxopt_llm.checkpoints.files import TensorSpec
from jaxopt_llm.checkpoints.floats import to_floats
from jaxopt_llm.checkpoints.hf import CONFIG
from jaxopt_llm.kernels import QArray, Weight
from jaxopt_llm.models import ModelConfig, Transformer, weights
from jaxopt_llm.models.families import family, parse_config, write_config
from jaxopt_llm.models.family import Source
from jaxopt_llm.text import Tokenizer

_ALIGNED = 16  # bytes: what torch's grouped products want of the rows of experts


def export(
    model: Transformer, tokenizer: Tokenizer | None, target: str | Path, *, codes: bool = False
) -> None:
    """Writes config.json, safetensors and the tokenizer, whole or not at all.

    Args:
      model: of any family.
      tokenizer: None leaves it out.
      target: a directory.
      codes: quantized products of the layers are written as compressed-tensors keeps them, for vLLM and transformers
        with that package. Embedding and head, without `codes` all weights, are written as the floats they stand for.

    Raises:
      ValueError: if transformers' config cannot say all that the model's does, or it takes no such width; with `codes`,
        if nothing is quantized, or a weight in a form that compressed-tensors does not have.
      OSError: if `target` is something else than a checkpoint, or the disk is full.
    """
    config = write_config(model.config, str(model.dtype))
    _refuse_if_lost(model.config, config)
    _refuse_width(model.config, model.dtype)
    kept = _codes(model) if codes else {}
    if codes:
        config[compressed.KEY] = _settings(model, kept)
    with atomic_directory(target, marker=CONFIG) as directory:
        safetensors.write(directory, _tensors(model, kept), {"format": "pt"})
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


def _refuse_width(config: ModelConfig, dtype: jnp.dtype) -> None:
    """Raises ValueError for a model width that transformers 5 loads no such model of, or cannot run."""
    if family(config.family).heads_divide_width and config.d_model % config.num_heads:
        raise ValueError(
            f"transformers refuses {config.family} models whose num_heads={config.num_heads} do not divide "
            f"d_model={config.d_model}; prune to another width or number of heads, or keep our own format"
        )
    if config.experts and config.d_model * dtype.itemsize % _ALIGNED:
        raise ValueError(
            f"d_model={config.d_model}: transformers' experts need rows of whole {_ALIGNED} bytes; prune to a "
            f"multiple of {_ALIGNED // dtype.itemsize}, or keep our own format"
        )


def _rounded(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value


_Codes = dict[str, tuple[QArray, compressed.Scheme]]


def _codes(model: Transformer) -> _Codes:
    """The weights that are written as codes, by their names in the file, an expert at a time."""
    kept = _Codes()
    for parameter, value in weights(model).items():
        if not isinstance(value, QArray) or not parameter.startswith("layers."):
            continue
        source = family(model.config.family).source(parameter)
        if source.part or source.transposed:
            raise ValueError(
                f"{parameter} shares a tensor with others, which compressed-tensors does not have"
            )
        for e, name in enumerate(_names(source, value)):
            own = value[e] if value.ndim > 2 else value
            kept[name] = own, compressed_export.scheme_of(name.removesuffix(".weight"), own)
    if not kept:
        raise ValueError(
            "no product of the layers is quantized; quantize the model, or write it without codes"
        )
    return kept


def _names(source: Source, value: Weight) -> list[str]:
    """The names of a parameter's tensors: one, or one an expert."""
    if "{e}" not in source.name:
        return [source.name]
    return [source.name.replace("{e}", str(e)) for e in range(value.shape[0])]


def _settings(model: Transformer, kept: _Codes) -> dict[str, Any]:
    """`quantization_config`; products that have no codes are named in it."""
    floats = ["lm_head"] if model.config.tied else []
    for parameter, value in weights(model).items():
        if value.ndim > 1 and parameter.endswith(".weight") and parameter != "embed.weight":
            names = _names(family(model.config.family).source(parameter), value)
            floats += [name.removesuffix(".weight") for name in names if name not in kept]
    return compressed_export.settings([scheme for _, scheme in kept.values()], floats)


def _tensors(model: Transformer, kept: _Codes) -> list[TensorSpec]:
    kind = family(model.config.family)
    sources: dict[str, list[tuple[Source, Weight]]] = defaultdict(list)
    for name, value in weights(model).items():
        source = kind.source(name)
        sources[source.name].append((source, value))
    result: list[TensorSpec] = []
    for name, (own, scheme) in kept.items():
        result += compressed_export.tensors(name, own, scheme)
    for name, parts in sources.items():
        source, value = parts[0]
        if _names(source, value)[0] in kept:
            continue
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
