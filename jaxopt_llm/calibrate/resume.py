"""Layers that a walk has finished, on disk: an interrupted one goes on after them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxopt_llm.calibrate.method import LayerWeights, Method
from jaxopt_llm.checkpoints import Offload, read_weights, write_weights
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.models import Transformer, weights

_RUN = "walk.json"


class Finished:
    """The finished layers of one walk.

    Args:
      folder: of the walk; made if it is not there.
      model, ids, methods: what make the walk.

    Raises:
      ValueError: if the walk whose layers `folder` holds has another model, text or method.
    """

    def __init__(
        self, folder: Path, model: Transformer, ids: Int[np.ndarray, "N T"], methods: Sequence[Method]
    ):
        self.folder = folder
        run = origin(model, ids) | {"methods": [repr(m) for m in methods]}
        started = folder / _RUN
        if started.exists():
            refuse_another(folder, json.loads(started.read_text("utf-8")), run)
        else:
            with atomic_file(started) as file:
                file.write(json.dumps(run, indent=1).encode())
        self._offload = Offload(folder)

    def read(self, layer: int) -> LayerWeights | None:
        """The weights of a layer, mapped from the disk; None if it is not finished."""
        path = self._path(layer)
        return self._offload.keep(read_weights(path)) if path.exists() else None

    def write(self, layer: int, values: LayerWeights) -> LayerWeights:
        """Keeps a finished layer, whole or not at all; the same weights, mapped from the disk."""
        write_weights(self._path(layer), values)
        return self._offload.keep(values)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"


def origin(model: Transformer, ids: Int[np.ndarray, "N T"]) -> dict[str, Any]:
    """What tells calibrations apart: digests of the model and of the text."""
    return {"model": _of_model(model), "text": _digest([ids])}


def refuse_another(
    place: Path, there: Mapping[str, Any], run: Mapping[str, Any], *, kind: str = "a calibration"
) -> None:
    """Raises ValueError if what is kept at `place`, of this kind, comes of something else than this run."""
    differs = [name for name, value in run.items() if there.get(name) != value]
    if differs:
        raise ValueError(
            f"{place} holds {kind} with another {' and '.join(differs)}; give the same to go on with it, "
            "or remove it to start anew"
        )


def _of_model(model: Transformer) -> str:
    described = json.dumps([model.config.to_json(), str(model.dtype)], sort_keys=True).encode()
    return _digest([np.frombuffer(described, np.uint8), *jax.tree.leaves(weights(model))])


def _digest(arrays: Sequence[Any]) -> str:
    """Of the bytes of arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
