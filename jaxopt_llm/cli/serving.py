"""A serving config under the flags of a command that runs a model: what is given beside it wins."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from jaxopt_llm import configs
from jaxopt_llm.engine import EngineConfig, ServingConfig

SERVING = flags.DEFINE_string(
    "config",
    None,
    "Serving config, such as size --write makes: model, mesh, rounding and sizes of the engine. A packaged name, or "
    "one's own file.py. Flags that are given beside it win.",
)


def serving(source: str | None, overrides: Sequence[str]) -> ServingConfig | None:
    """The config that --config names, with --set; None where there is none.

    Raises:
      ValueError: for a config of another kind, or --set alone.
    """
    if source is None:
        if overrides:
            raise ValueError(f"--set={overrides[0]} has no config to change; name one with --{SERVING.name}")
        return None
    config = configs.load(source, overrides)
    if not isinstance(config, ServingConfig):
        raise ValueError(
            f"--config={source} is a {type(config).__name__}; commands that run a model take a ServingConfig"
        )
    return config


def model_of(config: ServingConfig | None, flag: flags.FlagHolder[str]) -> str:
    """Which model to load: the flag's, where it is given or there is no config."""
    return flag.value if config is None or flag.present else config.model


def loading_of(config: ServingConfig | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """How to load it: what the config says, with the flags that were given in place of it."""
    own = {} if config is None else {"mesh": config.mesh, "quantize": config.quantize}
    return {name: value for name, value in own.items() if value is not None} | dict(given)


def engine_of(
    config: ServingConfig | None, otherwise: EngineConfig, **given: flags.FlagHolder[Any]
) -> EngineConfig:
    """The engine's sizes: the config's, or others where there is none; a flag that is given stands for its field."""
    sizes = otherwise if config is None else config.engine
    return dataclasses.replace(sizes, **{name: flag.value for name, flag in given.items() if flag.present})
