"""Hugging Face directories: config.json and safetensors."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxopt_llm.checkpoints import located as lay
from jaxopt_llm.checkpoints.files import CheckpointError, Tensor, TensorSource
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.models import ModelConfig, ParamSpec
from jaxopt_llm.models.families import family, parse_config
from jaxopt_llm.models.family import Family, Source

CONFIG = "config.json"
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
        return parse_config(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(path, str(error)) from error


def locate(source: TensorSource, config: ModelConfig, wanted: Mapping[str, ParamSpec]) -> dict[str, Located]:
    """Every parameter of the model in the files.

    Raises:
      CheckpointError: listing all missing, unexpected and misshapen tensors.
    """
    kind = family(config.family)
    tensors, aside = _text_model(source, kind)
    if config.tied:
        tensors.pop(kind.names["head.weight"].name, None)  # some tied checkpoints repeat the embedding
    used: set[str] = set()
    found, names = {}, {}
    for parameter in wanted:
        place = kind.source(parameter)
        names[parameter] = place.name
        entry = _find(place, tensors, config, used)
        if entry is not None:
            found[parameter] = entry
    lay.check(source.path, wanted, found, names, [name for name in tensors if name not in used])
    if aside:
        towers = sorted({_tower(name) for name in aside})
        logging.getLogger(__name__).warning(
            "%s: loaded the text model, skipped %s", source.path, ", ".join(towers)
        )
    return found


def _text_model(source: TensorSource, kind: Family) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names that a text-only checkpoint gives them, and those that are no part of it."""
    tensors, aside = {}, []
    for name, tensor in source.items():
        for prefix, replacement in _PREFIXES:
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
        if kind.skipped.match(name.removeprefix("model.")):
            aside.append(name)
        else:
            tensors[name] = tensor
    return tensors, aside


def _tower(name: str) -> str:
    return name.removeprefix("model.").split(".")[0]


def _find(
    place: Source, tensors: Mapping[str, Tensor], config: ModelConfig, used: set[str]
) -> Located | None:
    if "{e}" in place.name:
        assert config.experts
        if config.experts.count > len(tensors):
            return None
        names = [place.name.replace("{e}", str(e)) for e in range(config.experts.count)]
        if any(name not in tensors for name in names) or len({tensors[name].shape for name in names}) > 1:
            return None
        used.update(names)
        return lay.stacked([tensors[name] for name in names])
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
