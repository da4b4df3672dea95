"""Make language models smaller, faster and bigger than one chip, without leaving JAX.

import jaxopt_llm as jo
model, tokenizer = jo.load("smollm2-135m-instruct")
small = jo.quantize(model, "int8")
print(jo.generate(small, tokenizer, ["Why is the sky blue?"], max_tokens=64)[0].text)
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxopt_llm.checkpoints import Adapter, load, load_adapter, save
    from jaxopt_llm.engine import Engine, EngineConfig, Result, SamplingParams, generate
    from jaxopt_llm.kernels import QArray
    from jaxopt_llm.models import Batch, ModelConfig, Transformer, apply, capture, from_params
    from jaxopt_llm.quantize import quantize
    from jaxopt_llm.sharding import MeshSpec
    from jaxopt_llm.text import Tokenizer

__version__ = "0.1.0"

# Found when first asked for, so that `jaxopt-llm --help` and `import jaxopt_llm` load no JAX.
_HOMES = {
    "checkpoints": ("Adapter", "load", "load_adapter", "save"),
    "engine": ("Engine", "EngineConfig", "Result", "SamplingParams", "generate"),
    "kernels": ("QArray",),
    "models": ("Batch", "ModelConfig", "Transformer", "apply", "capture", "from_params"),
    "quantize": ("quantize",),
    "sharding": ("MeshSpec",),
    "text": ("Tokenizer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "Batch",
    "Engine",
    "EngineConfig",
    "MeshSpec",
    "ModelConfig",
    "QArray",
    "Result",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "apply",
    "capture",
    "from_params",
    "generate",
    "load",
    "load_adapter",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"jaxopt_llm.{_HOME_OF[name]}"), name)
    module = f"jaxopt_llm.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # something that the module imports is not installed
            raise
        raise AttributeError(f"module 'jaxopt_llm' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})


class _Package(types.ModuleType):
    """Keeps `jo.quantize` the function: importing the folder of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
