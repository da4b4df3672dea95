"""See and change activations by name, without editing the model."""

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopt_llm.models.transformer import Transformer

Replace = Callable[[Array], Array]


class Captured(nnx.Module):
    """A model whose call also returns the named activations: made by `capture`."""

    def __init__(self, model: Transformer, patterns: tuple[str, ...], replace: Mapping[str, Replace]):
        self.model = model
        self.patterns, self.replace = patterns, tuple(replace.items())
        self._taps()  # an unknown name is an error now, not at the first call

    def __call__(
        self, tokens: Int[Array | np.ndarray, "B T"]
    ) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
        """Logits, and each captured activation `[B, T, ...]` under its name, after its replacement."""
        model = nnx.merge(*nnx.split(self.model))  # a copy whose parts can be exchanged
        seen: dict[str, Array] = {}
        for name, (keep, functions) in self._taps().items():
            see = functools.partial(_see, name, functions, seen if keep else {}, tokens.shape)
            tap(_part(model, name), functools.partial(_through, see))
        return model(tokens), seen

    def _taps(self) -> dict[str, tuple[bool, list[Replace]]]:
        names = module_names(self.model)
        for pattern in (*self.patterns, *(pattern for pattern, _ in self.replace)):
            if not any(_matches(name, pattern) for name in names):
                known = sorted({name.replace(".0", ".*") for name in names if not _later_layer(name)})
                raise ValueError(f"no activation is named {pattern!r}; names are {', '.join(known)}")
        taps = {}
        for name in names:
            keep = any(_matches(name, pattern) for pattern in self.patterns)
            functions = [f for pattern, f in self.replace if _matches(name, pattern)]
            if keep or functions:
                taps[name] = (keep, functions)
        return taps


def capture(model: Transformer, *patterns: str, replace: Mapping[str, Replace] | None = None) -> Captured:
    """A model that also returns what its parts give, and lets functions change it.

    Args:
      model: left as it is; parameters are shared, gradients reach them.
      patterns: names of parts, `*` for any one of them, such as `"layers.*.mlp.down"`, `"layers.3"`, `"embed"`. What is
        captured is the part's output, flattened heads and all.
      replace: name pattern to a function of the activation `[B, T, ...]`; what it returns goes on,
        in the dtype of the activation.

    Raises:
      ValueError: if a pattern matches no part; the message lists the names.

    Example:
      logits, seen = jo.capture(model, "layers.*.mlp", replace={"layers.3": lambda x: x + steer})(tokens)
    """
    return Captured(model, patterns, replace or {})


def module_names(model: Transformer) -> list[str]:
    """Every part that can be captured, layers in their order."""
    names: dict[str, None] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parts = [str(part) for part in path]
        depths = range(2, len(parts)) if parts[0] == "layers" else range(1, len(parts))
        names |= {".".join(parts[:depth]): None for depth in depths}
    return [name for name in names if not _EXPERT_PRODUCT.search(name)]


# The experts' products see rows sorted by expert, which have no place in [B, T].
_EXPERT_PRODUCT = re.compile(r"\.moe\.(gate|up|down)$")


def _matches(name: str, pattern: str) -> bool:
    """Part by part: `layers.*` are the layers, not what is in them."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _later_layer(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "layers" and parts[1] != "0"


def _part(module: Any, name: str) -> Any:
    for part in filter(None, name.split(".")):
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    return module


def _see(
    name: str, functions: list[Replace], seen: dict[str, Array], shape: tuple[int, ...], flat: Array
) -> Array:
    x = flat.reshape(*shape, *flat.shape[1:])
    for function in functions:
        x = function(x).astype(flat.dtype)
    if x.shape[:2] != shape or x.size != flat.size:
        raise ValueError(
            f"the replacement of {name} gave shape {x.shape}; it must keep {(*shape, *flat.shape[1:])}"
        )
    seen[name] = x
    return x.reshape(flat.shape)


def tap(part: Any, see: Callable[[Array, Any], Any]) -> None:
    """Exchanges a part's class for one of its own, whose call gives what `see` makes of its first argument and result.

    Args:
      part: of a model that is the caller's own, such as one merged inside a compiled function.
      see: a function of the first argument and of what the part gave.
    """

    class Tapped(type(part)):  # type: ignore[misc]
        def __call__(self, x: Array, *args: Any) -> Any:
            return see(x, super().__call__(x, *args))

    part.__class__ = Tapped


def _through(see: Replace, _: Array, out: Any) -> Any:
    """What a part gives, its first array through `see`."""
    return (see(out[0]), *out[1:]) if isinstance(out, tuple) else see(out)
