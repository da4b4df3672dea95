"""GGUF files that llama.cpp loads."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_llm.checkpoints import blocks, gguf
from jaxopt_llm.checkpoints.files import TensorSpec
from jaxopt_llm.checkpoints.floats import to_floats
from jaxopt_llm.checkpoints.gguf_config import (
    ARCHITECTURES,
    PERIODS,
    ROPE_FACTORS,
    sliding_layers,
    to_config,
)
from jaxopt_llm.checkpoints.gguf_model import interleaved_heads, tensor_name
from jaxopt_llm.checkpoints.located import half_split_order
from jaxopt_llm.kernels import QArray, Weight
from jaxopt_llm.models import ModelConfig, Rope, Transformer, abstract, quantizable, specs, weights
from jaxopt_llm.models.rope import amplitude, frequencies
from jaxopt_llm.text import Tokenizer
from jaxopt_llm.text.gguf_read import PREFIX, TokenType

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # llama.cpp's llama_ftype
_APART = {"family", "bos_id", "eos_ids", "pad_id", "rope", "rope_local"}  # without effect, or compared apart


def check_name(path: Path) -> None:
    """Raises ValueError for a file that would not be found again as a model."""
    if path.suffix != ".gguf":
        raise ValueError(f"{path} must end in .gguf, or no command finds a model in it; try {path}.gguf")


def export(model: Transformer, tokenizer: Tokenizer | None, path: str | Path, *, dtype: str = "F16") -> None:
    """Writes a GGUF file in place of `path`, whole or not at all, with one tensor in memory at a time.

    Args:
      model: of any family, within what llama.cpp knows of its architecture.
      tokenizer: None for a file that llama.cpp runs on token ids alone.
      path: of the file; ends in .gguf, by which it is found again.
      dtype: of matrices: F32, F16 or Q8_0 (F16 where 32 does not divide the rows). Weights quantized in
        groups of 32 go to Q8_0 as they are, others by their values. Routers, norms and biases are F32.

    Raises:
      ValueError: if `path` ends otherwise, `dtype` is unknown, GGUF cannot hold the model or tokenizer, or float16
        a value.
      OSError: if the disk is full.
    """
    if dtype not in _FILE_TYPES:
        raise ValueError(f"{dtype=} is unknown; known are {', '.join(_FILE_TYPES)}")
    config, path = model.config, Path(path)
    check_name(path)
    keys = metadata(config)
    keys |= {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }
    tensors = [_tensor(name, weight, config, dtype) for name, weight in weights(model).items()]
    factors = _llama3_factors(config)
    if factors is not None:
        tensors.append((ROPE_FACTORS, factors.shape, "F32", factors))
    gguf.write(path, keys | _vocabulary(tokenizer, config), tensors)


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys that say what a model is.

    Raises:
      ValueError: if they, and llama.cpp's fixed choices, cannot say all that decides its forward.
    """
    if config.family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"GGUF export knows no family {config.family!r}; known are {known}")
    keys = {"general.architecture": ARCHITECTURES[config.family]} | _architecture_keys(config)
    shapes = {tensor_name(name, config): spec.shape for name, spec in specs(abstract(config)).items()}
    _refuse_if_lost(config, to_config(keys, shapes, _llama3_factors(config)))
    return keys


def _architecture_keys(config: ModelConfig) -> dict[str, Any]:
    architecture, experts = ARCHITECTURES[config.family], config.experts
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if experts:
        keys |= {"expert_count": experts.count, "expert_used_count": experts.per_token}
        if architecture != "llama":
            keys["expert_feed_forward_length"] = experts.d_ff
    if architecture in PERIODS:
        keys |= _window_keys(config, PERIODS[architecture])
    if architecture == "gemma3" and config.rope_local:
        keys["rope.freq_base_swa"] = float(config.rope_local.theta)
    if architecture == "gemma2" and config.attention_softcap:
        keys["attn_logit_softcapping"] = float(config.attention_softcap)
    if architecture in ("gemma2", "gemma3") and config.logit_softcap:
        keys["final_logit_softcapping"] = float(config.logit_softcap)
    return {f"{architecture}.{key}": value for key, value in (keys | _rope_keys(config.rope)).items()}


def _window_keys(config: ModelConfig, period: int) -> dict[str, Any]:
    slides = [window is not None for window in config.windows]
    keys: dict[str, Any] = {}
    if any(slides):
        keys["attention.sliding_window"] = next(window for window in config.windows if window is not None)
    if slides != sliding_layers(period, config.num_layers):
        keys["attention.sliding_window_pattern"] = slides
    return keys


def _rope_keys(rope: Rope) -> dict[str, Any]:
    if rope.kind == "default":
        return {}
    if rope.kind == "llama3":  # the rest is in the tensor of its factors
        return {"rope.scaling.original_context_length": rope.original_max_seq_len}
    keys: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope.original_max_seq_len
        paper = dataclasses.replace(rope, attention_factor=None, mscale=None, mscale_all_dim=None)
        if amplitude(rope) != amplitude(paper):
            keys["rope.scaling.attn_factor"] = amplitude(rope) / amplitude(paper)
    return keys


def _llama3_factors(config: ModelConfig) -> np.ndarray | None:
    """What Llama 3's scaling divides each frequency by, float32 `[head_dim / 2]`."""
    if config.rope.kind != "llama3":
        return None
    plain = frequencies(Rope(theta=config.rope.theta), config.head_dim)
    return plain / frequencies(config.rope, config.head_dim)


def _vocabulary(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    if tokenizer is None:
        roles = {"bos": config.bos_id, "padding": config.pad_id}
        roles |= dict(zip(("eos", "eot", "eom"), config.eos_ids, strict=False))
        ids = {f"{PREFIX}{role}_token_id": index for role, index in roles.items() if index is not None}
        return {f"{PREFIX}model": "no_vocab"} | ids
    keys, rows = tokenizer.to_gguf(), config.vocab_size
    types = keys[f"{PREFIX}token_type"]
    if TokenType.NORMAL in types[rows:]:
        raise ValueError(
            f"the tokenizer has {len(types)} tokens but the embedding only {rows} rows; GGUF cannot hold that"
        )
    if types[rows:]:
        left_out = len(types) - rows
        warnings.warn(f"left out {left_out} special tokens beyond the embedding's {rows} rows", stacklevel=2)
    fillers: dict[str, list[Any]] = {  # llama.cpp wants exactly one token for every row of the embedding
        f"{PREFIX}tokens": [f"[PAD{index}]" for index in range(len(types), rows)],
        f"{PREFIX}token_type": [int(TokenType.UNUSED)] * (rows - len(types)),
        f"{PREFIX}scores": [-1000.0] * (rows - len(types)),
    }
    return keys | {key: (keys[key] + filler)[:rows] for key, filler in fillers.items() if key in keys}


def _tensor(parameter: str, weight: Weight, config: ModelConfig, dtype: str) -> TensorSpec:
    storage = dtype if quantizable(parameter, weight.shape) else "F32"
    if storage == "Q8_0" and weight.shape[-1] % 32:
        storage = "F16"
    make = functools.partial(_stored, parameter, weight, config, storage)
    return tensor_name(parameter, config), weight.shape, storage, make


def _stored(parameter: str, weight: Weight, config: ModelConfig, storage: str) -> np.ndarray:
    """The values, or the blocks, in the file's own order of rows."""
    heads = interleaved_heads(parameter, config)
    rows = np.argsort(half_split_order(weight.shape[0], heads)) if heads else slice(None)
    if storage == "Q8_0" and isinstance(weight, QArray) and _is_q8_0(weight):
        return blocks.pack_q8_0(np.asarray(weight.data)[rows], np.asarray(weight.scale)[rows])
    floats = to_floats(weight)
    if config.norm_offset and parameter.endswith("norm.weight"):
        floats = floats.astype(np.float32) + np.float32(config.norm_offset)
    return floats[rows]


def _is_q8_0(weight: QArray) -> bool:
    return (
        weight.bits == 8 and weight.group == 32 and weight.bias is None and weight.scale.dtype == np.float16
    )


def _refuse_if_lost(config: ModelConfig, read: ModelConfig) -> None:
    """Raises ValueError if a reader of the file would compute something else than the model."""
    ours, theirs = _forward(config), _forward(read)
    lost = [name for name in ours if ours[name] != theirs[name]]
    if not np.allclose(_turns(config), _turns(read), rtol=1e-5, atol=0):
        lost.append("rope")
    architecture = ARCHITECTURES[config.family]
    if architecture in ("qwen2", "olmo2") and config.q_width != config.d_model:
        lost.append("head_dim")
    if lost:
        settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"llama.cpp's {architecture} models cannot have {settings}; keep the Hugging Face form or our own"
        )


def _forward(config: ModelConfig) -> dict[str, Any]:
    """What decides the forward, rope aside, in a form that can be compared."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _APART}
    values["query_scale"] = config.query_scale or config.head_dim**-0.5
    values["windows"] = tuple(w if w and w < config.max_seq_len else None for w in config.windows)
    if config.experts:
        values["d_ff"] = None  # of no layer here
    return {name: np.float32(value) if isinstance(value, float) else value for name, value in values.items()}


def _turns(config: ModelConfig) -> np.ndarray:
    """Radians a position of each layer, and the factor on sines and cosines, `[L, H / 2 + 1]`."""
    ropes = [config.layer_rope(layer) for layer in range(config.num_layers)]
    return np.stack([np.append(frequencies(rope, config.head_dim), amplitude(rope)) for rope in ropes])
