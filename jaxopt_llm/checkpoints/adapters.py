"""Adapters in PEFT's format: LoRA (arXiv:2106.09685), its variants rsLoRA and DoRA, and weights trained whole."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxopt_llm.checkpoints import hf, safetensors
from jaxopt_llm.checkpoints.adapter_config import CONFIG, AdapterConfig
from jaxopt_llm.checkpoints.files import CheckpointError, refuse_pickles
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.checkpoints.resolve import resolve
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import ModelConfig, ParamSpec, Transformer, abstract, from_params, specs, weights
from jaxopt_llm.models.families import family

WEIGHTS = "adapter_model.safetensors"
_ENDS = {"embed.weight", "head.weight"}  # PEFT saves them whole where the vocabulary has grown
PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
_PART = re.compile(r"(.+)\.lora_(?:(?:embedding_)?(A|B)|(magnitude)_vector)(?:\.weight)?")


class Change(NamedTuple):
    """What an adapter makes of a weight `w`: `w + b @ a`, its rows then scaled to their magnitudes.

    Attributes:
      value: in the place of `w`, in its shape, or None.
      a, b: `[*E, r, I]` and `[*E, O, r]`, float32, the adapter's scale in `b`; None where only `value` counts.
      magnitude: `[O]`, float32, the length of each row (DoRA, arXiv:2402.09353, equation 5), or None.
    """

    value: Any = None
    a: Any = None
    b: Any = None
    magnitude: Any = None

    def rows(self, w: Float[Any, "..."], first: int = 0, last: int | None = None) -> Float[Any, "..."]:
        """Rows first..last of the changed weight from those of `w`, float32. NumPy in, NumPy out."""
        part = slice(first, last)
        if self.value is not None:
            w = self.value[part].astype(jnp.float32)
        if self.a is not None:
            w = w + self.b[part] @ (self.a if self.a.ndim == 2 else self.a[part])
        if self.magnitude is not None:
            w = w * (self.magnitude[part] / (w * w).sum(-1) ** 0.5)[:, None]
        return w


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter by itself.

    Attributes:
      path: where it was read.
      config: how it is merged.
      tensors: by their names behind PEFT's prefix.
    """

    path: Path
    config: AdapterConfig
    tensors: Mapping[str, np.ndarray]

    def merge(self, model: Transformer) -> Transformer:
        """A copy of the model with the adapter in its weights: those it changes are new, all others are shared.

        On a mesh the new ones lie as the old ones do. An adapter of the embedding or the head of a model that has one
        for both was trained beside two: the copy has both.

        Raises:
          CheckpointError: listing all tensors that are missing, unexpected or misshapen.
          ValueError: if a weight is quantized. What an adapter adds may be less than half a step of the codes, and
            rounding the sum once more then loses it: measured at 0.3 % of the weights' size, int8 keeps 2 % of it.
        """
        config, changes = self.fit(model.config)
        values = weights(model)
        if config.tied != model.config.tied:
            values["head.weight"] = values["embed.weight"]
        for name, change in changes.items():
            value = values[name]
            if isinstance(value, QArray):
                raise ValueError(
                    f"{name} is quantized, and rounding it again could lose what the adapter adds; merge into "
                    "floats and quantize those, as jo.load(..., adapter=, quantize=) does"
                )
            values[name] = jax.device_put(_merged(value, change), value.sharding)
        return from_params(config, values, dtype=model.dtype)

    def fit(self, config: ModelConfig) -> tuple[ModelConfig, dict[str, Change]]:
        """The config of the merged model, and what changes of its parameters, by name.

        Raises:
          CheckpointError: listing all tensors that are missing, unexpected or misshapen.
        """
        apart = dataclasses.replace(config, tied=False)
        names = _Names.of(apart)
        problems: list[str] = []
        modules, saved = self._sorted(names, problems)
        problems += self._missing(names, modules, saved)
        changes = {name: Change(value=tensor) for name, tensor in saved.items()}
        for name, parts in names.by_parameter(modules).items():
            pair = self._pair(name, parts, names.specs[name].shape, problems)
            changes[name] = pair._replace(value=saved.get(name))
        if problems:
            raise CheckpointError(self.path, problems)
        return (apart if _ENDS & changes.keys() else config), changes

    def _sorted(
        self, names: "_Names", problems: list[str]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """What LoRA adds to each module, as A, B and magnitude, and the parameters that were trained whole."""
        modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        saved: dict[str, np.ndarray] = {}
        for name, tensor in self.tensors.items():
            part = _PART.fullmatch(name)
            module = hf.text_name(part[1]) if part else ""
            own = hf.text_name(
                name.replace(".base_layer.", ".")
            )  # an embedding's own rows may be beside its LoRA
            if part and module in names.modules and self._reads(part):
                modules[module][part[2] or part[3]] = tensor
            elif own in names.tensors and (self.config.saves(own) or names.tensors[own] in _ENDS):
                saved[names.tensors[own]] = tensor
                wanted = names.specs[names.tensors[own]].shape
                if tensor.shape != wanted:
                    problems.append(f"{name} has shape {tensor.shape}, the model wants {wanted}")
            else:
                problems.append(f"unexpected tensor {name!r}")
        return modules, saved

    def _reads(self, part: re.Match[str]) -> bool:
        """Whether the config speaks of a tensor of LoRA."""
        return self.config.targets(part[1]) and (part[3] is None or self.config.use_dora)

    def _missing(self, names: "_Names", modules: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
        """What the config names and the file lacks. Later versions of transformers have experts and their routers in
        forms that LoRA passes by, so that none of a layer's may be there.
        """
        begun = {names.modules[module][0] for module in modules}
        due = [
            module
            for module, (parameter, _) in names.modules.items()
            if self.config.targets(module) and (".moe." not in parameter or parameter in begun)
        ]
        parts = ("A", "B", "magnitude") if self.config.use_dora else ("A", "B")
        lacks = [
            f"missing LoRA {part} of {module}"
            for module in dict.fromkeys([*due, *modules])
            for part in parts
            if part not in modules.get(module, ())
        ]
        return lacks + [
            f"missing {name}"
            for name, parameter in names.tensors.items()
            if self.config.saves(name) and parameter not in saved
        ]

    def _pair(
        self,
        parameter: str,
        parts: Mapping[int | None, tuple[str, Mapping[str, np.ndarray]]],
        shape: tuple[int, ...],
        problems: list[str],
    ) -> Change:
        """A and B of a parameter, of shape `[*E, O, I]`, from those of its modules: one, or some of its experts'."""
        *experts, outputs, inputs = shape
        most = max(self.config.rank(module) for module, _ in parts.values())
        a, b = np.zeros((*experts, most, inputs), np.float32), np.zeros((*experts, outputs, most), np.float32)
        magnitude = None
        for expert, (module, given) in parts.items():
            if not {"A", "B"} <= given.keys():
                continue  # it is told as missing
            rank, first, second = self.config.rank(module), given["A"], given["B"]
            if parameter == "embed.weight":
                first, second = second.T, first.T
            if (first.shape, second.shape) != ((rank, inputs), (outputs, rank)):
                found = f"{given['A'].shape} and {given['B'].shape}"
                problems.append(
                    f"LoRA A and B of {module} have shapes {found}, of rank {rank} for {outputs} x {inputs}"
                )
                continue
            place = () if expert is None else (expert,)
            a[(*place, slice(rank))] = first
            b[(*place, slice(None), slice(rank))] = second.astype(np.float32) * self.config.scale(module)
            if "magnitude" in given:
                magnitude = given["magnitude"].astype(np.float32)
                if parameter == "embed.weight" or experts or magnitude.shape != (outputs,):
                    problems.append(f"DoRA of {module}, with magnitudes {magnitude.shape}, cannot be merged")
        return Change(a=a, b=b, magnitude=magnitude)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Names:
    """A model's parameters by their names in a Hugging Face checkpoint.

    Attributes:
      specs: of the parameters, by our own names.
      tensors: those that lie there as they are, to our own names.
      modules: of weights that LoRA can stand beside, to our own names and the expert among several.
    """

    specs: dict[str, ParamSpec]
    tensors: dict[str, str]
    modules: dict[str, tuple[str, int | None]]

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        kind, wanted = family(config.family), specs(abstract(config))
        tensors: dict[str, str] = {}
        modules: dict[str, tuple[str, int | None]] = {}
        for name, spec in wanted.items():
            source = kind.source(name)
            if source.part or source.transposed:
                continue
            experts: list[int | None] = [None]
            if "{e}" in source.name:
                experts = list(range(spec.shape[0]))
            else:
                tensors[source.name] = name
            if len(spec.shape) > 1 and name.endswith(".weight"):
                module = source.name.removesuffix(".weight")
                modules |= {module.replace("{e}", str(e)): (name, e) for e in experts}
        return cls(specs=wanted, tensors=tensors, modules=modules)

    def by_parameter(self, modules: Mapping[str, Any]) -> dict[str, dict[int | None, tuple[str, Any]]]:
        """Modules, and what is given for them, by parameter and expert."""
        result: dict[str, dict[int | None, tuple[str, Any]]] = defaultdict(dict)
        for module, given in modules.items():
            parameter, expert = self.modules[module]
            result[parameter][expert] = module, given
        return result


def load_adapter(source: str | Path) -> Adapter:
    """Reads an adapter: a directory with adapter_config.json and adapter_model.safetensors, or `hf:org/name`.

    Raises:
      CheckpointError: if a file is absent or damaged, or the config has a setting that changes the result and that no
        code reads.
    """
    path = Path(resolve(str(source)))
    if not (path / CONFIG).exists():
        raise CheckpointError(path, f"no {CONFIG} in it: this is no adapter in PEFT's format")
    config = AdapterConfig.read(path / CONFIG)
    if not (path / WEIGHTS).exists():
        refuse_pickles(path)
        raise CheckpointError(path, f"no {WEIGHTS} in it")
    with safetensors.open_file(path / WEIGHTS) as file:
        strange = [
            f"tensor {name!r} holds {tensor.storage}, no floats"
            for name, tensor in file.items()
            if not jnp.issubdtype(tensor.dtype, jnp.floating)
        ]
        if strange:
            raise CheckpointError(path / WEIGHTS, strange)
        tensors = {name.removeprefix(PREFIX): tensor.read() for name, tensor in file.items()}
    return Adapter(path=path, config=config, tensors=tensors)


def changed(located: Located, change: Change) -> Located:
    """A parameter in a file as an adapter leaves it."""

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        return change.rows(located.read(first, last, np.float32), first, last).astype(dtype)

    return Located(located.shape, read)


@jax.jit
def _merged(weight: Float[Array, "..."], change: Change) -> Float[Array, "..."]:
    with jax.default_matmul_precision("highest"):
        return change.rows(weight.astype(jnp.float32)).astype(weight.dtype)
