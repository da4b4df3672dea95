"""Random adapters in PEFT's format, and in float64 what they make of a weight."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."


def write(directory: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """An adapter of these tensors, PEFT's prefix put before their names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    arrays = {PREFIX + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, directory / "adapter_model.safetensors")
    return directory


def lora(
    rng: np.random.Generator, module: str, outputs: int, inputs: int, rank: int
) -> dict[str, np.ndarray]:
    """A and B of a module."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 0.1
    return {f"{module}.lora_A.weight": draw(rank, inputs), f"{module}.lora_B.weight": draw(outputs, rank)}


def merged(
    w: Any,
    tensors: Mapping[str, np.ndarray],
    module: str,
    *,
    alpha: float,
    rs: bool = False,
    magnitude: Any = None,
) -> np.ndarray:
    """`W + alpha / r * B @ A` (rsLoRA: over the root of r), with DoRA at the given row lengths; float64."""
    a, b = (tensors[f"{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    result = np.asarray(w, np.float64) + alpha / (math.sqrt(len(a)) if rs else len(a)) * (b @ a)
    if magnitude is None:
        return result
    return result * (magnitude / np.linalg.norm(result, axis=1))[:, None]
