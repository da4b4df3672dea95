"""adapter_config.json of PEFT: what of it says how LoRA is merged, and which keys cannot matter."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.hf import read_json

CONFIG = "adapter_config.json"

# Keys of the config that cannot change what is merged: where it came from, how it was trained, how A and B began.
# `fan_in_fan_out` is for models whose weights are stored [in, out]; none of the families is.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode lora_dropout
    lora_ga_config loftq_config megatron_config megatron_core peft_version qalora_group_size revision runtime_config
    task_type velora_config""".split()
)
# All others change the model's own weights too.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The keys of adapter_config.json that say what is merged, with PEFT's names and defaults."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | Sequence[str] = ()
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()

    @classmethod
    def read(cls, path: Path) -> "AdapterConfig":
        """Raises CheckpointError for each key that is not as it must be, or that no code reads."""
        values = {key: value for key, value in read_json(path).items() if value is not None}
        problems = [
            f"{key}={values[key]!r} must be {kind}"
            for key, (kind, fits) in _KINDS.items()
            if key in values and not fits(values[key])
        ]
        problems += [
            f"{key}={value!r} is a setting that no code reads"
            for key, value in values.items()
            if value and key not in _KINDS.keys() | _HARMLESS  # what is not in use is null, false or empty
        ]
        if problems:
            raise CheckpointError(path, problems)
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What the product of A and B is multiplied by; rsLoRA: arXiv:2312.03732."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether LoRA was trained beside this module."""
        if _named(self.exclude_modules, module) or self.saves(f"{module}."):
            return False
        if self.target_modules == "all-linear":
            return module.startswith("model.layers.")
        if isinstance(self.target_modules, str):
            return _named(self.target_modules, module)
        return _named(self.target_modules, module) and self._reaches(module)

    def saves(self, tensor: str) -> bool:
        """Whether this tensor was trained whole: one of a module whose name ends as one of `modules_to_save`."""
        return any(f"{name}." in tensor for name in self.modules_to_save)

    def _reaches(self, module: str) -> bool:
        """Whether the module's layer is among those of `layers_to_transform`."""
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns or [r"[^.]*"])
        layer = next((int(match[1]) for match in found if match), None)
        return layer in (layers if isinstance(layers, list) else [layers])


def _named(names: str | Sequence[str], module: str) -> bool:
    """A regular expression for the whole name, or ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name fits."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


Fits = Callable[[Any], bool]


def _all(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _by_patterns(fits: Fits) -> Fits:
    return lambda value: (
        isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(fits, value.values()))
    )


_is_text = lambda value: isinstance(value, str)
_is_flag = lambda value: type(value) is bool
_is_rank = lambda value: type(value) is int and value > 0
_is_number = lambda value: type(value) in (int, float) and math.isfinite(value)
_is_layer = lambda value: type(value) is int and value >= 0
_is_layers = lambda value: _is_layer(value) or _all(_is_layer)(value)
_is_patterns = lambda value: _is_pattern(value) or _all(_is_pattern)(value)
_is_named = lambda value: _is_pattern(value) or _all(_is_text)(value)
_KINDS: dict[str, tuple[str, Fits]] = {
    "peft_type": ("'LORA': other kinds are not merged", lambda value: value == "LORA"),
    "bias": ("'none': trained biases are not merged", lambda value: value == "none"),
    "init_lora_weights": (f"one of {_BEGINNINGS}: others change the model too", lambda v: v in _BEGINNINGS),
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "target_modules": ("a regular expression or a list of names", _is_named),
    "exclude_modules": ("a regular expression or a list of names", _is_named),
    "modules_to_save": ("a list of names", _all(_is_text)),
    "rank_pattern": ("an object of ranks by regular expressions", _by_patterns(_is_rank)),
    "alpha_pattern": ("an object of numbers by regular expressions", _by_patterns(_is_number)),
    "layers_to_transform": ("a layer or a list of them", _is_layers),
    "layers_pattern": ("a regular expression or a list of them", _is_patterns),
}
