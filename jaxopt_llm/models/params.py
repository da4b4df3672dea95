"""Parameters as a pytree: names, shapes and logical axes; building a model from them, and placing it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from jaxopt_llm.kernels import QArray, Weight
from jaxopt_llm.kernels.formats import Format
from jaxopt_llm.models.config import ModelConfig
from jaxopt_llm.models.layers import flat_params, weights
from jaxopt_llm.models.transformer import Transformer
from jaxopt_llm.sharding import MeshSpec, Sharding


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What a parameter must be: the shape of its values, dtype, and a logical axis a dimension."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


def abstract(
    config: ModelConfig, dtype: jnp.dtype = jnp.float32, rounding: Format | None = None
) -> Transformer:
    """A model whose parameters are shapes: nothing is allocated.

    Args:
      config: of the model.
      dtype: of floats.
      rounding: of the weights of products, as `quantize` would round them.

    Raises:
      ValueError: for a weight whose width the format's groups do not divide.
    """
    model = Transformer(config, dtype=dtype, rngs=None)
    if rounding is None:
        return model
    codes = {}
    for name, spec in specs(model).items():
        if quantizable(name, spec.shape):
            rounding.check(spec.shape[-1], name)
            codes[name] = rounding.shapes(spec.shape)
    return with_weights(model, codes)


def specs(model: Transformer) -> dict[str, ParamSpec]:
    """Every parameter of a model (abstract or not) under its dotted name."""
    result = {}
    for name, param in flat_params(model).items():
        value = param.get_value()
        result[name] = ParamSpec(tuple(value.shape), getattr(value, "dtype", model.dtype), param.axes)
    return result


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Weights of products, embedding and head included; routers, norms and biases stay float."""
    return len(shape) >= 2 and name.endswith(".weight") and ".router." not in name


def flatten(tree: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """A nested tree of parameters as one of dotted names; a flat one as it is."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        if isinstance(value, Mapping | list | tuple):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def mismatches(wanted: Mapping[str, ParamSpec], given: Mapping[str, Sequence[int]]) -> list[str]:
    """Every missing, unexpected and misshapen parameter, a line each."""
    problems = [f"missing {name} {spec.shape}" for name, spec in wanted.items() if name not in given]
    problems += [f"unexpected {name} {tuple(shape)}" for name, shape in given.items() if name not in wanted]
    return problems + [
        f"{name} has shape {tuple(given[name])}, the config wants {spec.shape}"
        for name, spec in wanted.items()
        if name in given and tuple(given[name]) != spec.shape
    ]


def from_params(
    config: ModelConfig, tree: Mapping[str, Any], *, dtype: jnp.dtype = jnp.float32
) -> Transformer:
    """A model over one's own parameters, nested or with dotted names; plain arrays or `QArray`s.

    Args:
      config: what the model is.
      tree: every parameter, as `layers.0.attention.q.weight` or nested by its parts.
      dtype: of activations.

    Raises:
      ValueError: listing all missing, unexpected and misshapen parameters.
    """
    model, values = abstract(config, dtype), flatten(tree)
    _refuse(mismatches(specs(model), {name: value.shape for name, value in values.items()}))
    return with_weights(model, values)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("parameters do not fit the config:\n  " + "\n  ".join(problems))


def with_weights(model: Transformer, values: Mapping[str, Weight | jax.ShapeDtypeStruct]) -> Transformer:
    """A copy of `model` that has these values, or shapes, in place of its own; the rest is shared.

    Raises:
      ValueError: listing all that is no parameter of the model, or has another shape.
    """
    own = {name: spec for name, spec in specs(model).items() if name in values}
    _refuse(mismatches(own, {name: value.shape for name, value in values.items()}))
    graph, state = nnx.split(model)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        value = values.get(".".join(map(str, path)))
        if value is not None:
            is_ready = isinstance(value, QArray | jax.ShapeDtypeStruct)
            variable = variable.replace(value if is_ready else jnp.asarray(value))
        flat.append((path, variable))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def without_layers(model: Transformer) -> Transformer:
    """The embedding, final norm and head of a model, which are shared with it."""
    top = nnx.merge(*nnx.split(model))
    top.layers = nnx.List([])
    return top


def apply(graph: nnx.GraphDef, params: Any, tokens: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T V"]:
    """Logits as a pure function: `graph, params = nnx.split(model)`."""
    return nnx.merge(graph, params)(tokens)


def shardings(spec: ParamSpec, weight: Any, sharding: Sharding, name: str) -> Any:
    """A `NamedSharding` for each leaf of a weight, or of the shapes of one, on the devices of its stage.

    Raises:
      ValueError: if an axis does not divide, or a group of a quantized weight would straddle two shards.
    """
    sharding = sharding.of_stage(_stage_of(name, sharding))
    whole = sharding.named(spec.axes, name)
    if not isinstance(weight, QArray):
        return whole
    mesh, parts = sharding.mesh, sharding.spec(spec.axes, name)
    groups, axis = weight.scale.shape[-1], parts[-1]
    if axis and groups > 1 and groups % mesh.shape[axis]:
        raise ValueError(
            f"{name} has {groups} groups of {weight.group}, which mesh {axis}={mesh.shape[axis]} does not divide"
        )
    per_group = whole if groups > 1 else NamedSharding(mesh, jax.sharding.PartitionSpec(*parts[:-1], None))
    return dataclasses.replace(
        weight, data=whole, scale=per_group, bias=None if weight.bias is None else per_group
    )


def _stage_of(name: str, sharding: Sharding) -> int:
    """The stage that a parameter lies in: the embedding in the first one, final norm and head in the last."""
    part, _, rest = name.partition(".")
    if part == "layers":
        return sharding.stage_of(int(rest.partition(".")[0]))
    return 0 if part == "embed" else sharding.stages - 1


def place(model: Transformer, sharding: Sharding) -> Transformer:
    """A copy of the model with every parameter on the mesh; of an abstract one, shapes that say where they would be."""
    wanted, values = specs(model), {name: p.get_value() for name, p in flat_params(model).items()}
    placed = {
        name: jax.tree.map(_put, value, shardings(wanted[name], value, sharding, name))
        for name, value in values.items()
    }
    return with_weights(model, placed)


def widest_mesh(config: ModelConfig, devices: int, rounding: Format | None = None) -> MeshSpec:
    """As many tensor shards as divide every parameter, of at most so many devices.

    Args:
      config: of the model.
      devices: that there are.
      rounding: of the weights, whose groups no shard may cut.
    """
    shapes = abstract(config, rounding=rounding)
    wanted, values = specs(shapes), {name: p.get_value() for name, p in flat_params(shapes).items()}
    for tensor in range(devices, 1, -1):
        mesh = MeshSpec(tensor=tensor)
        try:
            config.kv_heads_of_shard(tensor)
            sharding = Sharding(mesh.abstract(), config.units)
            for name, spec in wanted.items():
                shardings(spec, values[name], sharding, name)
        except ValueError:
            continue
        return mesh
    return MeshSpec()


def _put(leaf: Any, where: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)


def num_params(model: Transformer) -> int:
    """Numbers that the model holds: codes count, their scales do not."""
    return sum(int(np.prod(spec.shape)) for spec in specs(model).values())


def num_zeros(model: Transformer) -> int:
    """Float parameters that are zero; codes are not looked at."""
    floats = (value for value in weights(model).values() if not isinstance(value, QArray))
    return sum(value.size - int(jnp.count_nonzero(value)) for value in floats)


def num_bytes(model: nnx.Module) -> int:
    """Bytes that the parameters of a model, or of a part of one, occupy: scales included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def bits_per_parameter(model: Transformer) -> float:
    """Bits that a number of the model takes: everything stored, scales, embedding and head included."""
    return 8 * num_bytes(model) / num_params(model)
