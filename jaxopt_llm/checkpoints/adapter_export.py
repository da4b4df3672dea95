"""LoRA adapters out, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from jaxopt_llm.checkpoints.adapter_config import CONFIG
from jaxopt_llm.checkpoints.adapters import PREFIX, WEIGHTS
from jaxopt_llm.checkpoints.atomic import atomic_directory
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.models.families import family


def export(
    config: ModelConfig, matrices: Mapping[str, Float[Array, "_ _"]], target: str | Path, *, alpha: float
) -> None:
    """Writes an adapter, whole or not at all.

    Args:
      config: of the model that it stands beside.
      matrices: A `[r, I]` and B `[O, r]` of parameters, as `layers.0.attention.q.weight.A`.
      target: directory.
      alpha: the product of B and A is multiplied by `alpha / r`.

    Raises:
      ValueError: for a parameter that lies in another form in the family's own checkpoints.
      OSError: if `target` is something else than an adapter, or the disk is full.
    """
    tensors, modules = {}, set()
    for name, matrix in matrices.items():
        parameter, part = name.rsplit(".", 1)
        source = family(config.family).source(parameter)
        if source.part or source.transposed or "{e}" in source.name:
            raise ValueError(
                f"{parameter} lies in {source.name} in another form, and PEFT knows no adapter of it"
            )
        module = source.name.removesuffix(".weight")
        modules.add(module.rsplit(".", 1)[-1])
        tensors[f"{PREFIX}{module}.lora_{part}.weight"] = np.asarray(matrix)
    (rank,) = {matrix.shape[0] for name, matrix in matrices.items() if name.endswith(".A")}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
    }
    with atomic_directory(target, marker=CONFIG) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
