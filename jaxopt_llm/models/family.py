"""What a family file declares, and the reader of Hugging Face configs that leaves no key unread."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxopt_llm.models.config import Activation, ModelConfig, Rope

# Keys that cannot change the forward of an inference run, whatever their value.
_HARMLESS = frozenset(
    """_name_or_path _attn_implementation _commit_hash architectures attention_dropout auto_map
    cache_implementation chunk_size_feed_forward classifier_dropout dtype embd_pdrop finetuning_task
    generation_config hidden_dropout id2label initializer_range is_decoder is_encoder_decoder label2id model_type
    output_attentions output_hidden_states output_router_logits pretraining_tp problem_type resid_pdrop return_dict
    router_aux_loss_coef router_jitter_noise tokenizer_class torch_dtype transformers_version
    unsloth_fixed unsloth_version use_cache""".split()
)
_REQUIRED = object()
_MOST_LAYERS = 10_000  # a model is built layer by layer, even without weights
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


_ACTIVATION_NAMES: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class HFConfig:
    """A `config.json` that remembers which keys were read."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self._unread = {key for key, value in values.items() if value is not None} - _HARMLESS

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`, now read; `default` where it is absent or null.

        Raises:
          ValueError: if it is absent and there is no default.
        """
        self._unread.discard(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(
                f"config.json has no {key!r}, which {self.values.get('model_type')!r} models need"
            )
        return default

    def count(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 2**31 - 1) -> Any:
        """As `take`, of which only whole numbers from `least` to `most` make sense."""
        fits = lambda value: type(value) is int and least <= value <= most
        return self._of_kind(key, default, fits, f"a whole number from {least} to {most}")

    def layers(self) -> int:
        return self.count("num_hidden_layers", most=_MOST_LAYERS)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """As `take`, of which only numbers above 0 make sense."""
        fits = lambda value: type(value) in (int, float) and 0 < value < 2**127
        return self._of_kind(key, default, fits, "a number above 0")

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """As `take`, of true and false."""
        return self._of_kind(key, default, lambda value: type(value) is bool, "true or false")

    def table(self, key: str) -> dict[str, Any]:
        """As `take`, of an object; an empty one where there is none."""
        return self._of_kind(key, {}, lambda value: isinstance(value, dict), "an object")

    def listed(self, key: str, default: Any = _REQUIRED) -> Any:
        """As `take`, of a list."""
        return self._of_kind(key, default, lambda value: isinstance(value, list), "a list")

    def tokens(self, key: str) -> tuple[int, ...]:
        """Ids of special tokens: one, a list, or none, which some files write as -1."""
        value = self.take(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(index) is not int or not -1 <= index < 2**31 for index in ids):
            raise ValueError(f"config.json has {key}={value!r}; a token's id was expected, or a list of them")
        return tuple(index for index in ids if index >= 0)

    def _of_kind(self, key: str, default: Any, fits: Callable[[Any], bool], kind: str) -> Any:
        value = self.take(key, default)
        if value is not default and not fits(value):
            raise ValueError(f"config.json has {key}={value!r}; {kind} was expected")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """Reads `key`, of which only these values (and absence) are supported."""
        value = self.take(key, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"config.json has {key}={value!r}; only {' or '.join(map(repr, allowed))} is supported"
            )

    def finish(self) -> None:
        """Raises ValueError if a key was not read: a setting ignored in silence would change the results."""
        if self._unread:
            settings = ", ".join(f"{key}={self.values[key]!r}" for key in sorted(self._unread))
            raise ValueError(
                f"config.json has settings that no code reads for model_type "
                f"{self.values.get('model_type')!r}: {settings}; remove them if they cannot change the forward"
            )

    def decoder(self, family: str, **settings: Any) -> ModelConfig:
        """A `ModelConfig` from the keys that every decoder has; `settings` come first.

        `settings` are `ModelConfig` fields; `windows` defaults to none, `rope` to what the config says.
        """
        layers, heads, width = self.layers(), self.count("num_attention_heads"), self.count("hidden_size")
        activation = self.take("hidden_act", "silu")
        common = {
            "vocab_size": self.count("vocab_size"),
            "d_model": width,
            "d_ff": self.count("intermediate_size"),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": self.count("num_key_value_heads", heads),
            "head_dim": self.count("head_dim", width // heads),
            "max_seq_len": self.count("max_position_embeddings"),
            "norm_eps": self.number("rms_norm_eps", 1e-6),
            "tied": self.flag("tie_word_embeddings", False),
            "bos_id": next(iter(self.tokens("bos_token_id")), None),
            "eos_ids": self.tokens("eos_token_id"),
            "pad_id": next(iter(self.tokens("pad_token_id")), None),
        }
        if "activation" not in settings:
            common["activation"] = self.activation(activation)
        if "windows" not in settings:
            common["windows"] = (None,) * layers
        if "rope" not in settings:
            common["rope"] = self.rope(common["max_seq_len"])
        return ModelConfig(family=family, **(common | settings))

    def activation(self, name: Any) -> Activation:
        if str(name) not in _ACTIVATIONS:
            raise ValueError(f"config.json has activation {name!r}; known are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def windows(self, sliding: Callable[[int], bool], window: int | None) -> tuple[int | None, ...]:
        """Each layer's window: by `layer_types` where the config has them, else where `sliding(i)`."""
        layers, types = self.layers(), self.listed("layer_types", None)
        if types is not None:
            unknown = [kind for kind in types if kind not in ("sliding_attention", "full_attention")]
            if unknown:
                raise ValueError(f"config.json has layer_types {unknown}; only sliding and full attention")
            slides = [kind == "sliding_attention" for kind in types]
        else:
            slides = [window is not None and sliding(i) for i in range(layers)]
        if any(slides) and window is None:
            raise ValueError("config.json has layers with sliding_attention but no sliding_window")
        return tuple(window if slide else None for slide in slides)

    def one_window(self, window: int | None) -> tuple[int | None, ...]:
        """The same window for all layers: transformers reads no `layer_types` in some families."""
        windows = self.windows(lambda i: True, window)
        if len(set(windows)) > 1:
            family = self.values.get("model_type")
            raise ValueError(
                f"config.json has layer_types of several kinds; all layers of {family} are alike"
            )
        return windows

    def rope(self, max_seq_len: int, *, theta: float = 10000.0, layer_type: str | None = None) -> Rope:
        """Reads transformers 4's `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`.

        Args:
          max_seq_len: `max_position_embeddings`, the context before scaling where nothing else says it.
          theta: base where the config has none.
          layer_type: which entry to take where `rope_parameters` has one for each type of layer.
        """
        scaling, base = self.table("rope_scaling"), self.number("rope_theta", theta)
        parameters = self.table("rope_parameters")
        if layer_type in parameters:
            parameters = HFConfig(parameters).table(layer_type)
        return _rope(scaling | parameters, base, max_seq_len)


def _rope(scaling: dict[str, Any], theta: float, max_seq_len: int) -> Rope:
    theta = float(HFConfig(scaling).number("rope_theta", theta))
    scaling = {key: value for key, value in scaling.items() if value is not None and key != "rope_theta"}
    kind: Any = str(scaling.pop("rope_type", scaling.pop("type", "default")))
    scaling.pop("type", None)  # older files write both names
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json turns only a part of each head (partial_rotary_factor); not supported")
    fields = {"linear": _LINEAR, "llama3": _LLAMA3, "yarn": _YARN, "default": {}}
    if kind not in fields:
        raise ValueError(f"config.json has rope_type {kind!r}; known are {', '.join(fields)}")
    if kind == "default" and scaling.get("factor") == 1:
        scaling.pop("factor")
    if kind != "default" and "factor" not in scaling:
        raise ValueError(f"config.json has rope_type {kind!r} without a factor")
    unknown = set(scaling) - set(fields[kind])
    if unknown:
        raise ValueError(f"config.json has rope settings that no code reads for {kind!r}: {sorted(unknown)}")
    settings = {fields[kind][key]: value for key, value in scaling.items()}
    if kind in ("llama3", "yarn"):
        settings.setdefault("original_max_seq_len", max_seq_len)
    return Rope(theta=theta, kind=kind, **settings)


_LINEAR = {"factor": "factor"}
_LLAMA3 = _LINEAR | {
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
_YARN = _LINEAR | {
    "original_max_position_embeddings": "original_max_seq_len",
    **{
        key: key
        for key in ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
    },
}


def activation_to_hf(config: ModelConfig) -> str:
    """`hidden_act` as `HFConfig.activation` reads it."""
    return _ACTIVATION_NAMES[config.activation]


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` as `HFConfig.windows` reads them."""
    types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    return {"sliding_window": next(filter(None, config.windows), None), "layer_types": types}


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_scaling` as `HFConfig.rope` reads it; `rope_type` default needs none."""
    names = {"default": {}, "linear": _LINEAR, "llama3": _LLAMA3, "yarn": _YARN}[rope.kind]
    values = {key: getattr(rope, field) for key, field in names.items()}
    return {"rope_type": rope.kind} | {key: value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter lies in a Hugging Face checkpoint.

    Attributes:
      name: with `{i}` for the layer and `{e}` for the expert; the experts are stacked.
      part: (start, step) of the rows taken from a tensor that interleaves several.
      transposed: the tensor is stored `[..., I, O]`.
    """

    name: str
    part: tuple[int, int] | None = None
    transposed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of checkpoints.

    Attributes:
      name: `model_type` of `config.json`.
      architecture: the transformers class that an exported directory names.
      read: `config.json` to `ModelConfig`.
      write: the keys of `config.json` beyond those that every decoder has.
      names: parameter (with `{i}`) to its source.
      towers: what multimodal checkpoints hold beside the text model, by the first part of its tensors' names.
      heads_divide_width: whether transformers refuses another number of heads, whatever their own width.
    """

    name: str
    architecture: str
    read: Callable[[HFConfig], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    names: Mapping[str, Source]
    towers: tuple[str, ...] = ()
    heads_divide_width: bool = False

    def source(self, parameter: str) -> Source:
        """The source of a parameter such as `layers.3.attention.q.weight`, its layer filled in."""
        pattern = re.sub(r"^layers\.\d+\.", "layers.{i}.", parameter)
        source = self.names[pattern]
        layer = parameter.split(".")[1] if pattern != parameter else ""
        return dataclasses.replace(source, name=source.name.replace("{i}", layer))

    def parse(self, values: Mapping[str, Any]) -> ModelConfig:
        """A `ModelConfig` from `config.json`, every key of it accounted for."""
        config = HFConfig(values)
        result = self.read(config)
        config.finish()
        return result


def decoder_names(**extra: str | Source) -> dict[str, Source]:
    """The names that llama made common, and a family's own (written with `__` for `.`, under the layer)."""
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    }
    for letter in "qkvo":
        for leaf in ("weight", "bias"):
            names[f"layers.{{i}}.attention.{letter}.{leaf}"] = (
                f"model.layers.{{i}}.self_attn.{letter}_proj.{leaf}"
            )
    for part in ("gate", "up", "down"):
        for leaf in ("weight", "bias"):
            names[f"layers.{{i}}.mlp.{part}.{leaf}"] = f"model.layers.{{i}}.mlp.{part}_proj.{leaf}"
    return {name: Source(hf) for name, hf in names.items()} | layer_names(**extra)


def layer_names(**names: str | Source) -> dict[str, Source]:
    """`attention__q_norm="self_attn.q_norm.weight"`: names under a layer, on both sides."""
    result = {}
    for ours, theirs in names.items():
        source = Source(theirs) if isinstance(theirs, str) else theirs
        ours = "layers.{i}." + ours.replace("__", ".")
        result[ours] = dataclasses.replace(source, name=f"model.layers.{{i}}.{source.name}")
    return result


QK_NORMS = {
    "attention__q_norm__weight": "self_attn.q_norm.weight",
    "attention__k_norm__weight": "self_attn.k_norm.weight",
}
SANDWICH_NORMS = {
    "attention_post_norm__weight": "post_attention_layernorm.weight",
    "mlp_norm__weight": "pre_feedforward_layernorm.weight",
    "mlp_post_norm__weight": "post_feedforward_layernorm.weight",
}
