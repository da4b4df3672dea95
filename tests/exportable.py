"""Tiny random models that GGUF can hold: those of `tests/families.py`, less what llama.cpp has no key for."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_llm import checkpoints
from jaxopt_llm.checkpoints import blocks, gguf
from jaxopt_llm.models import Transformer, abstract, from_params, specs
from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families import parse_config
from tests import families

# For each, the settings that differ from those of the family's tiny model.
CHANGES = {
    "llama": {},
    "llama_bias": {},
    "llama_linear": {},
    "llama_llama3": {},
    "llama_yarn": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_yarn": {
        "rope_scaling": {
            "attention_factor": 0.8,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
            "rope_type": "yarn",
        }
    },
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gpt_oss": {
        "rope_scaling": families.GPT_OSS["rope_scaling"] | {"beta_fast": 32.0},
        "swiglu_limit": 7.0,
    },
    "olmo2": {},
}
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}  # every matrix has rows of whole Q8_0 blocks


def config(name: str, **changes: object) -> ModelConfig:
    return parse_config(families.recorded(name)["config"] | CHANGES[name] | changes)


@functools.cache
def model(name: str, **changes: object) -> Transformer:
    """Random weights, at a scale that lets every tensor matter."""
    shape = config(name, **changes)
    rng = np.random.default_rng(0)
    return from_params(
        shape, {part: _draw(rng, part, spec.shape, shape) for part, spec in specs(abstract(shape)).items()}
    )


_Q4_K_M = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "attn_k": "Q5_0"}  # all others are Q4_K
_SCALES = {
    "Q4_K": ((0, 4e-4), (2, 3e-3)),
    "Q5_0": ((0, 0.01),),
    "Q6_K": ((208, 7e-5),),
}  # at which byte of a block


def write_q4_k_m(path: Path) -> None:
    """A file of the types that llama.cpp's Q4_K_M mixes, Q5_0 where rows are too short for Q4_K; random codes."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    wide = model("llama", hidden_size=256, intermediate_size=512, **heads)
    checkpoints.export_gguf(wide, None, path, dtype="F32")
    with gguf.open_file(path) as source:
        metadata, floats = source.metadata, {name: tensor.read() for name, tensor in source.items()}
    rng = np.random.default_rng(0)
    tensors = []
    for name, values in floats.items():
        storage = "F32" if values.ndim == 1 else _Q4_K_M.get(name.split(".")[-2], "Q4_K")
        data = values if storage == "F32" else _random_blocks(rng, storage, values.shape)
        tensors.append((name, values.shape, storage, data))
    gguf.write(path, metadata, tensors)


def _random_blocks(rng: np.random.Generator, storage: str, shape: tuple[int, int]) -> np.ndarray:
    elements, nbytes = blocks.SIZES[storage]
    raw = rng.integers(0, 256, (shape[0], shape[1] // elements, nbytes), np.uint8)
    for at, scale in _SCALES[storage]:
        raw[..., at : at + 2] = np.float16([scale]).view(np.uint8)
    return raw.reshape(shape[0], -1)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], config: ModelConfig) -> jax.Array:
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        noise = 0.2 * noise + 1 - config.norm_offset
    elif name == "embed.weight":
        noise *= 0.05 if config.scale_embedding else 0.3
    elif name.endswith("bias"):
        noise *= 0.3
    elif not name.endswith("sinks"):
        noise *= 1.5 / np.sqrt(shape[-1])
    return jnp.asarray(noise, jnp.float32)
