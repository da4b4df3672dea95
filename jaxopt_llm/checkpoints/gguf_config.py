"""GGUF metadata to a `ModelConfig`, with the defaults and the fixed choices of llama.cpp.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what an architecture makes of them:
https://github.com/ggml-org/llama.cpp/tree/master/src/models.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_llm.checkpoints.files import CheckpointError, TensorSource
from jaxopt_llm.models import ModelConfig, Rope
from jaxopt_llm.models.families import parse_config
from jaxopt_llm.models.rope import frequencies
from jaxopt_llm.text.gguf_read import PREFIX

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each frequency by, float32 [head_dim / 2]
ARCHITECTURES = {  # by family
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "gpt_oss": "gpt-oss",
}
PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}  # one layer in so many sees all, the last of each period

_HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type"}  # for logits
_LLAMA3_CONTEXT = 8192  # before the scaling, where nothing says otherwise: that of every Llama 3
_REQUIRED = object()


class _Header:
    """The keys of the architecture, which remembers those that were read, and the shapes of the tensors."""

    def __init__(self, metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]):
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _READERS:
            known = ", ".join(sorted(_READERS))
            raise ValueError(f"unknown general.architecture {architecture!r}; known are {known}")
        self.architecture, prefix = architecture, f"{architecture}."
        self.shapes = shapes
        self._metadata = metadata
        self._values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        self._unread = set(self._values) - _HARMLESS

    def take(self, key: str, kinds: tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """A value of one of these types, now read."""
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"the metadata have no {self.architecture}.{key}")
        if value is not default and type(value) not in kinds:
            raise ValueError(f"{self.architecture}.{key} is {value!r}, of the wrong type")
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive whole number; a list with one for each layer must repeat it. 0 is as good as absent."""
        value = self.take(key, (int, list), default)
        if isinstance(value, list):
            if not value or any(entry != value[0] for entry in value):
                raise ValueError(f"{self.architecture}.{key} differs between layers, which is not supported")
            value = value[0]
        return self._positive(key, value, default, below=2**31)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A positive number."""
        value = self._positive(key, self.take(key, (int, float), default), default, below=3e38)
        return value if value is default else _shortest(value)

    def _positive(self, key: str, value: Any, default: Any, *, below: float) -> Any:
        if value is default or (value == 0 and default is not _REQUIRED):
            return default
        if type(value) not in (int, float) or not 0 < value < below:
            raise ValueError(f"{self.architecture}.{key}={value!r} is no number above 0 and below {below}")
        return value

    def tokens(self, *roles: str) -> list[int]:
        """The ids of special tokens, those there are."""
        ids = [self._metadata.get(f"{PREFIX}{role}_token_id") for role in roles]
        if any(type(index) not in (int, type(None)) for index in ids):
            raise ValueError(f"the ids of the {', '.join(roles)} tokens are {ids}, of the wrong type")
        return list(dict.fromkeys(index for index in ids if index is not None))

    def finish(self) -> None:
        """Raises ValueError if a key was not read: a setting ignored in silence would change the results."""
        if self._unread:
            keys = ", ".join(
                f"{self.architecture}.{key}={self._values[key]!r}" for key in sorted(self._unread)
            )
            raise ValueError(f"the metadata have settings that no code reads: {keys}")


def read_config(source: TensorSource) -> ModelConfig:
    """The `ModelConfig` of a GGUF file.

    Raises:
      CheckpointError: for an unknown architecture, or a key that is missing, malformed or that no code reads.
    """
    factors = source[ROPE_FACTORS].read() if ROPE_FACTORS in source else None
    try:
        return to_config(source.metadata, {name: t.shape for name, t in source.items()}, factors)
    except ValueError as error:
        raise CheckpointError(source.path, str(error)) from error


def to_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], rope_factors: np.ndarray | None = None
) -> ModelConfig:
    """What llama.cpp makes of a file with these metadata and tensors; ValueError where it is unusable."""
    header = _Header(metadata, shapes)
    values = _decoder(header)
    values |= _READERS[header.architecture](header, values)
    if rope_factors is not None and header.architecture == "llama":
        if values["rope_scaling"]:
            raise ValueError(f"both rope.scaling and a tensor {ROPE_FACTORS!r}; one alone is supported")
        original = header.size("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
        values["rope_scaling"] = _llama3(rope_factors, values["rope_theta"], values["head_dim"], original)
    header.finish()
    return parse_config(values)


def _decoder(header: _Header) -> dict[str, Any]:
    """What all architectures share, in the words of transformers."""
    embedding = header.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ValueError(f"tensor 'token_embd.weight' is missing, or no matrix: {tuple(embedding)}")
    layers, heads = header.size("block_count"), header.size("attention.head_count")
    if layers > len(header.shapes):
        raise ValueError(f"block_count={layers}, but there are only {len(header.shapes)} tensors")
    width, context = header.size("embedding_length"), header.size("context_length")
    head_dim = header.size("attention.key_length", width // heads)
    widths = head_dim, header.size("attention.value_length", width // heads)
    if {*widths, header.size("rope.dimension_count", head_dim)} != {head_dim}:
        raise ValueError(
            "attention.key_length, attention.value_length and rope.dimension_count must be equal"
        )
    expert_width = header.size("expert_feed_forward_length", None)
    return {
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": header.size("feed_forward_length", expert_width or _REQUIRED),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": header.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": header.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, context),
        "tie_word_embeddings": "output.weight" not in header.shapes,
        "bos_token_id": next(iter(header.tokens("bos")), None),
        "eos_token_id": header.tokens("eos", "eot", "eom"),
        "pad_token_id": next(iter(header.tokens("padding")), None),
    }


def _rope_scaling(header: _Header, context: int) -> dict[str, Any] | None:
    kind = header.take("rope.scaling.type", (str,), "linear")
    factor = header.number("rope.scaling.factor", None) or header.number("rope.scale_linear", 1.0)
    original = header.size("rope.scaling.original_context_length", context)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"unknown rope.scaling.type {kind!r}; known are none, linear, yarn")
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": header.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": header.number("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": header.number("rope.scaling.yarn_attn_factor", None),
    }
    times = header.number("rope.scaling.attn_factor", None)
    if times is not None:
        scaling["attention_factor"] = _shortest(times * (1 + 0.1 * math.log(max(factor, 1))))
    return scaling


def _shortest(value: float) -> float:
    """In as few digits as float32 needs: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _llama3(factors: np.ndarray, theta: float, head_dim: int, original: int) -> dict[str, Any] | None:
    """Llama 3's scaling from its factors, which are all that GGUF holds of it.

    A frequency that turns `t` times in the old context keeps the share `(t - low) / (high - low)` of itself,
    so two factors strictly between 1 and the largest give the borders; with fewer they are Llama 3's 1 and 4.
    """
    if factors.shape != (head_dim // 2,) or not np.all((factors >= 1) & (factors < 1e6)):
        raise ValueError(f"tensor {ROPE_FACTORS!r} does not hold {head_dim // 2} factors of 1 or more")
    factor = float(factors.max())
    if factor == 1:
        return None
    plain = frequencies(Rope(theta=theta), head_dim)
    turns = original * plain.astype(np.float64) / (2 * math.pi)
    kept = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-6) & (kept < 1 - 1e-6)
    low, high = 1.0, 4.0
    if np.count_nonzero(between) > 1:
        slope, offset = map(float, np.polyfit(turns[between], kept[between], 1))
        if slope > 0:
            low, high = (round(border, 3) for border in (-offset / slope, (1 - offset) / slope))
    found = lambda: Rope(
        theta=theta,
        kind="llama3",
        factor=factor,
        original_max_seq_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )
    if not 0 < low < high or not np.allclose(plain / frequencies(found(), head_dim), factors, rtol=1e-4):
        raise ValueError(f"tensor {ROPE_FACTORS!r} is not Llama 3's scaling from a context of {original}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _llama(header: _Header, values: Mapping[str, Any]) -> dict[str, Any]:
    if header.size("expert_count", None):
        return {"model_type": "mixtral"} | _experts(header)
    header.size("expert_used_count", None)
    biased = {name: f"blk.0.{name}.bias" in header.shapes for name in ("attn_q", "ffn_gate")}
    return {"model_type": "llama", "attention_bias": biased["attn_q"], "mlp_bias": biased["ffn_gate"]}


def _qwen3moe(header: _Header, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": header.size("expert_feed_forward_length"),
        "norm_topk_prob": True,
    } | _experts(header)


def _experts(header: _Header) -> dict[str, Any]:
    count, used = header.size("expert_count"), header.size("expert_used_count")
    if used > count:
        raise ValueError(f"expert_used_count={used} is more than expert_count={count}")
    return {"num_local_experts": count, "num_experts_per_tok": used}


def _gemma2(header: _Header, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(values, largest=46),
        "attn_logit_softcapping": header.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.number("final_logit_softcapping", 30.0),
        "tie_word_embeddings": True,
    } | _windows(header, values, default=4096)


def _gemma3(header: _Header, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(values, largest=62),
        "final_logit_softcapping": header.number("final_logit_softcapping", None),
        "rope_local_base_freq": header.number("rope.freq_base_swa", 10000.0),
    } | _windows(header, values, default=None)


def _query_scalar(values: Mapping[str, Any], largest: int) -> int:
    """The square of what queries are divided by; the 27B models, known by their depth, have their own."""
    if values["num_hidden_layers"] == largest:
        return values["hidden_size"] // values["num_attention_heads"]
    return values["head_dim"]


def _windows(header: _Header, values: Mapping[str, Any], default: Any = _REQUIRED) -> dict[str, Any]:
    window, layers = header.size("attention.sliding_window", default), values["num_hidden_layers"]
    pattern = header.take("attention.sliding_window_pattern", (int, list), PERIODS[header.architecture])
    slides = (
        sliding_layers(pattern, layers) if isinstance(pattern, int) else [bool(entry) for entry in pattern]
    )
    if len(slides) != layers:
        raise ValueError(f"attention.sliding_window_pattern has {len(slides)} entries for {layers} layers")
    types = ["sliding_attention" if window and slide else "full_attention" for slide in slides]
    return {"sliding_window": window, "layer_types": types}


def sliding_layers(period: int, layers: int) -> list[bool]:
    """Which layers slide where the last of each period sees all; 0: all slide."""
    return [period == 0 or i % period != period - 1 for i in range(layers)]


def _gpt_oss(header: _Header, values: Mapping[str, Any]) -> dict[str, Any]:
    scaling = values["rope_scaling"]
    if scaling and scaling["rope_type"] == "yarn":
        # How the model was trained, and what no key says: llama.cpp rounds yarn's borders here too.
        scaling = scaling | {"truncate": False}
    own = {
        "model_type": "gpt_oss",
        "intermediate_size": header.size("expert_feed_forward_length"),
        "swiglu_limit": 7.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": False,
    }
    return own | _experts(header) | _windows(header, values)


_READERS: dict[str, Callable[[_Header, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": lambda header, values: {"model_type": "qwen2"},
    "qwen3": lambda header, values: {"model_type": "qwen3"},
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "olmo2": lambda header, values: {"model_type": "olmo2", "tie_word_embeddings": False},
    "gpt-oss": _gpt_oss,
}
