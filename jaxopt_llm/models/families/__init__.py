"""The families that can be read, one thin file each."""

from collections.abc import Mapping
from typing import Any

from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.families import (
    gemma2,
    gemma3,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen3,
    qwen3_moe,
)
from jaxopt_llm.models.family import Family, activation_to_hf, rope_to_hf

_MODULES = (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, gpt_oss, olmo2)
FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def family(name: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: if it is unknown; the message lists the known.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model_type {name!r}; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def parse_config(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the contents of a `config.json`, multimodal wrappers around a text model included."""
    if values.get("model_type") == "gemma3" and "text_config" in values:
        values = gemma3.text_values(values)
    return family(str(values.get("model_type"))).parse(values)


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers reads, `parse_config` back."""
    kind = family(config.family)
    common = {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else rope_to_hf(config.rope),
        "hidden_act": activation_to_hf(config),
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
    }
    return common | kind.write(config)
