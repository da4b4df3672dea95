"""What of a student is trained: its weights, or adapters beside them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxopt_llm.distill import rounding
from jaxopt_llm.distill.config import LoRA
from jaxopt_llm.kernels import Format, QArray, quantization_format
from jaxopt_llm.models import Batch, Transformer, abstract, weights, with_weights
from jaxopt_llm.models.layers import Linear

Params = Mapping[str, Any]


class _Adapted(nnx.Module):
    """A product with a low-rank one beside it."""

    def __init__(self, linear: Linear, a: Array, b: Array, scale: float):
        self.linear, self.a, self.b, self.scale = linear, nnx.Param(a), nnx.Param(b), scale

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        a, b = (part.get_value().astype(x.dtype) for part in (self.a, self.b))
        return self.linear(x) + (x @ a.T) @ b.T * jnp.asarray(self.scale, x.dtype)


class _Remat(nnx.Module):
    """A layer whose inside is computed again for the gradients."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x: Array, turn: Array, batch: Batch, cache: None) -> tuple[Array, None]:
        return jax.checkpoint(lambda x, turn: self.layer(x, turn, batch, None)[0])(x, turn), cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A model apart: what is trained, what is not, and how they make a model.

    Attributes:
      skeleton: the model with shapes for parameters.
      params: trained, float32, by the model's own names; of adapters NAME.A and NAME.B.
      frozen: the others.
      lora: of the adapters, or None.
      remat: whether layers are computed again for the gradients.
      format: that trained matrices are rounded in, or None.
    """

    skeleton: Transformer
    params: dict[str, Array]
    frozen: dict[str, Any]
    lora: LoRA | None = None
    remat: bool = False
    format: Format | None = None

    @classmethod
    def of(
        cls,
        model: Transformer,
        *,
        dtype: Any = jnp.float32,
        lora: LoRA | None = None,
        remat: bool = False,
        quantize: str | None = None,
        seed: int = 0,
    ) -> Self:
        """
        Args:
          model: as loaded.
          dtype: of activations.
          lora, remat, quantize: as `Distillation` has them.
          seed: of the adapters' first values.

        Raises:
          ValueError: for quantized weights without adapters, targets that name nothing, adapters to merge into
            quantized weights, or a width that the groups of `quantize` do not divide.
        """
        values, skeleton = weights(model), abstract(model.config, dtype)
        codes = next((name for name, value in values.items() if isinstance(value, QArray)), None)
        if lora is not None:
            if codes and lora.merge:
                raise ValueError(
                    f"{codes} of the student is quantized, and rounding it again would lose most of what an adapter "
                    "adds; set lora.merge=false"
                )
            adapters = _adapters(values, lora, seed)
            return cls(skeleton=skeleton, params=adapters, frozen=values, lora=lora, remat=remat)
        if codes:
            raise ValueError(
                f"{codes} of the student is quantized, and rounded weights cannot be trained; set lora to train "
                "adapters beside them, or give a float student"
            )
        # A copy even where nothing changes: the first step gives it away, and the caller's model stays.
        trained = {name: jnp.array(value, jnp.float32, copy=True) for name, value in values.items()}
        format = None if quantize is None else quantization_format(quantize)
        if format:
            rounding.check(format, trained)
        return cls(skeleton=skeleton, params=trained, frozen={}, remat=remat, format=format)

    def rounded(self, params: Params) -> Params:
        """Trained parameters as the products are to see them."""
        return rounding.rounded(self.format, params) if self.format else params

    def model(self, params: Params, frozen: Params) -> Transformer:
        """The model that these make: to train where `params` are, or to run."""
        values = frozen if self.lora else {**frozen, **params}
        model = with_weights(self.skeleton, values)
        for name, scale in self._adapted(params):
            *place, part = name.removesuffix(".weight").split(".")
            owner = _part(model, place)
            adapter = _Adapted(getattr(owner, part), params[f"{name}.A"], params[f"{name}.B"], scale)
            setattr(owner, part, adapter)
        if self.remat:
            model.layers = nnx.List(_Remat(layer) for layer in model.layers)
        return model

    def head(self, params: Params, frozen: Params) -> Transformer:
        """A model whose head alone is there."""
        held = {name: value for name, value in {**frozen, **params}.items() if self.in_head(name)}
        return with_weights(self.skeleton, held)

    def in_head(self, name: str) -> bool:
        """Whether a parameter makes logits of hidden states."""
        return name.startswith("embed." if self.skeleton.config.tied else "head.")

    def merged(self, params: Params, dtype: Any) -> Transformer:
        """The trained model alone, its floats in `dtype`: all that no `format` rounds, and weights with adapters."""
        values: dict[str, Any] = {**self.frozen, **({} if self.lora else params)}
        for name, scale in self._adapted(params):
            weight = values[name]
            whole = (
                weight.dequantize(jnp.float32) if isinstance(weight, QArray) else weight.astype(jnp.float32)
            )
            values[name] = whole + params[f"{name}.B"] @ params[f"{name}.A"] * scale
        if self.format:
            values |= rounding.stored(self.format, values)
        cast = lambda value: value if isinstance(value, QArray) else value.astype(dtype)
        skeleton = abstract(self.skeleton.config, dtype)
        return with_weights(skeleton, {name: cast(value) for name, value in values.items()})

    def _adapted(self, params: Params) -> list[tuple[str, float]]:
        """The weights that have an adapter, and what its product is multiplied by."""
        if self.lora is None:
            return []
        scale = self.lora.alpha / self.lora.rank
        return [(name.removesuffix(".A"), scale) for name in params if name.endswith(".A")]


def _adapters(values: Params, lora: LoRA, seed: int) -> dict[str, Array]:
    """A is noise and B zero, so that training begins at the model itself."""
    named = [
        name
        for name, value in values.items()
        if name.startswith("layers.") and name.split(".")[-2] in lora.targets and len(value.shape) == 2
    ]
    if not named:
        raise ValueError(f"targets={lora.targets} name no product of the student's layers")
    found = {}
    for key, name in zip(jax.random.split(jax.random.key(seed), len(named)), named, strict=True):
        outputs, inputs = values[name].shape
        found[f"{name}.A"] = jax.random.normal(key, (lora.rank, inputs), jnp.float32) * inputs**-0.5
        found[f"{name}.B"] = jnp.zeros((outputs, lora.rank), jnp.float32)
    return found


def _part(model: Any, place: list[str]) -> Any:
    for name in place:
        model = model[int(name)] if name.isdecimal() else getattr(model, name)
    return model
