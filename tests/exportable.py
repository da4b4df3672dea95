"""Tiny random models that GGUF can hold: those of `tests/families.py`, less what llama.cpp has no key for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
