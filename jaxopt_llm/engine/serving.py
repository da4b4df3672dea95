"""A model and how it is served: what `--config` of the commands that run one names."""

import dataclasses

from jaxopt_llm.engine.config import EngineConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """What `jaxopt-llm size --write` writes, and `generate`, `chat` and `bench engine` read.

    Attributes:
      model: as `--model` names one.
      mesh: devices to spread it over, such as `tensor=4`; None for one.
      quantize: a format to round the weights to while they are read; None to take them as they are.
      engine: its sizes, of one data shard.
    """

    model: str
    mesh: str | None = None
    quantize: str | None = None
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; name one as --model does")
