"""Hugging Face directories: config.json and safetensors."""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_llm.checkpoints import compressed
from jaxopt_llm.checkpoints import located as lay
from jaxopt_llm.checkpoints.files import CheckpointError, Tensor, TensorSource
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.models import ModelConfig, ParamSpec
from jaxopt_llm.models.families import family, parse_config
from jaxopt_llm.models.family import Family, Source

CONFIG = "config.json"
_COMPUTED = ".rotary_emb.inv_freq"  # ends the names of tensors that repeat what the config says
_CHUNK = 1 << 20  # elements compared at once
# What multimodal wrappers put before the names of their text model, oldest first.
_PREFIXES = (("language_model.", ""), ("model.language_model.", "model."))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: if the file is absent, or holds something else.
    """
    if not path.exists():
        raise CheckpointError(
            path.parent, f"no {path.name} in this directory; name a checkpoint, or an alias"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(path, f"holds a {type(values).__name__} where an object was expected")
    return values


def read_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` of a directory's config.json.

    Raises:
      CheckpointError: for an unknown architecture, or a key that no code reads.
    """
    path = directory / CONFIG
    values = read_json(path)
    try:
        if compressed.schemes(values):
            values = {key: value for key, value in values.items() if key != compressed.KEY}
        return parse_config(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(path, str(error)) from error


def locate(source: TensorSource, config: ModelConfig, wanted: Mapping[str, ParamSpec]) -> dict[str, Located]:
    """Every parameter of the model in the files.

    Raises:
      CheckpointError: listing all missing, unexpected and misshapen tensors.
    """
    kind = family(config.family)
    tensors, towers = _text_model(source, kind)
    if config.tied:
        _drop_repeated_head(tensors, kind, source.path)
    schemes = _schemes(source.path, tensors)
    used: set[str] = set()
    found, names = {}, {}
    for parameter in wanted:
        place = kind.source(parameter)
        names[parameter] = place.name
        entry = _find(place, tensors, config, schemes, used)
        if entry is not None:
            found[parameter] = entry
    lay.check(source.path, wanted, found, names, [name for name in tensors if name not in used])
    if towers:
        skipped = ", ".join(sorted(towers))
        warnings.warn(f"{source.path}: loaded the text model, skipped {skipped}", stacklevel=2)
    return found


def _drop_repeated_head(tensors: dict[str, Tensor], kind: Family, path: Any) -> None:
    """Some tied checkpoints repeat the embedding as a head.

    Raises:
      CheckpointError: if they differ: transformers 4 drops such a head, transformers 5 uses it.
    """
    head, embedding = kind.names["head.weight"].name, kind.names["embed.weight"].name
    if head not in tensors or embedding not in tensors:
        return
    if not _same_values(tensors[head], tensors[embedding]):
        raise CheckpointError(
            path,
            f"tie_word_embeddings is true, but {head!r} is not {embedding!r}; set it to false in config.json, or "
            "remove the tensor, whichever the model was trained with",
        )
    del tensors[head]


def _same_values(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, _CHUNK // max(1, math.prod(one.shape[1:])))
    pieces = [(slice(first, first + step),) for first in range(0, one.shape[0], step)] if one.shape else [()]
    rows = lambda tensor, piece: tensor.read(piece, np.float32)
    return all(np.array_equal(rows(one, piece), rows(other, piece), equal_nan=True) for piece in pieces)


def _text_model(source: TensorSource, kind: Family) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by the names that a text-only checkpoint gives them, and the other models in it."""
    tensors, towers = {}, set()
    for name, tensor in source.items():
        name = text_name(name)
        tower = name.removeprefix("model.").split(".")[0]
        if tower in kind.towers:
            towers.add(tower)
        elif not name.endswith(_COMPUTED):
            tensors[name] = tensor
    return tensors, towers


def text_name(name: str) -> str:
    """What a text-only checkpoint calls a tensor of a multimodal one."""
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
    return name


def _schemes(path: Path, tensors: Mapping[str, Tensor]) -> tuple[compressed.Scheme, ...]:
    """How weights are quantized that are, by the config.json beside them."""
    if not any(name.endswith(".weight_scale") for name in tensors):
        return ()
    return compressed.schemes(read_json((path if path.is_dir() else path.parent) / CONFIG))


def _find(
    place: Source,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    schemes: Sequence[compressed.Scheme],
    used: set[str],
) -> Located | None:
    if "{e}" in place.name:
        assert config.experts
        if config.experts.count > len(tensors):
            return None
        sources = [
            dataclasses.replace(place, name=place.name.replace("{e}", str(e)))
            for e in range(config.experts.count)
        ]
        experts = [_find(source, tensors, config, schemes, used) for source in sources]
        whole = [expert for expert in experts if expert is not None]
        alike = len({(expert.shape, expert.form) for expert in whole}) == 1
        return lay.stacked(whole) if alike and len(whole) == len(experts) else None
    if quantized := compressed.locate(place.name, tensors, schemes, used):
        return quantized
    if place.name in tensors:
        used.add(place.name)
        tensor = tensors[place.name]
        fused = place.part or place.transposed
        return lay.part_of(tensor, place.part, place.transposed) if fused else lay.plain(tensor)
    packed = [f"{place.name}_blocks", f"{place.name}_scales"]
    if all(name in tensors for name in packed):
        used.update(packed)
        return lay.mxfp4(tensors[packed[0]], tensors[packed[1]], place.part)
    return None
