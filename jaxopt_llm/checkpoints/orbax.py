"""Our own format: `jaxopt_llm.json`, parameters in Orbax, and the tokenizer's files."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxopt_llm.checkpoints.atomic import atomic_directory
from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.hf import read_json
from jaxopt_llm.kernels import QArray, Weight
from jaxopt_llm.models import (
    ModelConfig,
    Transformer,
    abstract,
    from_params,
    mismatches,
    shardings,
    specs,
    weights,
)
from jaxopt_llm.sharding import Sharding
from jaxopt_llm.text import Tokenizer

MARKER = "jaxopt_llm.json"
_PARAMS = "params"
_VERSION = 1
_CODES = {8: (jnp.int8, jnp.float8_e4m3fn), 4: (jnp.uint8,), 3: (jnp.uint8,)}  # dtypes by bits
_CHUNK = 4 << 20  # bytes; each device that needs a part of a chunk reads all of it


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is in our own format."""
    return path.is_dir() and (path / MARKER).exists()


def save(model: Transformer, tokenizer: Tokenizer | None, target: str | Path) -> None:
    """Writes a model, quantized or not, so that it appears whole or not at all.

    Raises:
      OSError: if `target` is something else than a checkpoint of ours, or the disk is full.
    """
    values = weights(model)
    leaves = {name: _leaves(value) for name, value in values.items()}
    description = {
        "version": _VERSION,
        "dtype": str(model.dtype),
        "config": model.config.to_json(),
        "weights": {name: _describe(value) for name, value in values.items()},
    }
    with atomic_directory(target, marker=MARKER) as directory:
        try:
            with _checkpointer() as checkpointer:
                chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), leaves)
                checkpointer.save(directory / _PARAMS, ocp.args.PyTreeSave(leaves, chunked))
        except Exception as error:  # Orbax raises whatever its storage raises
            raise OSError(f"{target}: cannot be saved: {_first_line(error)}") from error
        if tokenizer is not None:
            tokenizer.save(directory)
        (directory / MARKER).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _checkpointer() -> ocp.Checkpointer:
    """Without compression: it hardly shrinks weights, and takes the largest array once more while it works."""
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _restore(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    """The weights of `target`, a few at a time: Orbax would read all at once."""
    sizes = {
        name: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
        for name, weight in target.items()
    }
    restored: dict[str, Any] = {}
    with _checkpointer() as checkpointer:
        for names in _groups(sizes):
            part = {name: target[name] for name in names}
            args = ocp.args.PyTreeRestore(
                part, ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True
            )
            restored |= jax.block_until_ready(checkpointer.restore(path, args))
    return restored


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in small groups, the largest first, alone: it takes the most, and nothing else is there yet."""
    most = max(sizes.values()) // 4
    group: list[str] = []
    taken = 0
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if group and taken + sizes[name] > most:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += sizes[name]
    yield group


def _describe(value: Weight) -> dict[str, Any]:
    """The shapes and dtypes of a weight's leaves, and what a quantized one is beside them."""
    leaves = {key: [list(leaf.shape), str(leaf.dtype)] for key, leaf in _leaves(value).items()}
    return leaves | ({"bits": value.bits, "act": value.act} if isinstance(value, QArray) else {})


def _leaves(value: Any) -> dict[str, Any]:
    """The arrays (or shapes) that a weight is made of, as Orbax gets them."""
    if not isinstance(value, QArray):
        return {"value": value}
    leaves = {"data": value.data, "scale": value.scale}
    return leaves if value.bias is None else leaves | {"bias": value.bias}


def read_config(path: Path) -> ModelConfig:
    """The config of a checkpoint of ours; nothing else is read."""
    return _read(path).config


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of the parameters' leaves by dtype; they are not read."""
    sizes: Counter[str] = Counter()
    for value in _read(path).weights.values():
        for leaf in jax.tree.leaves(value):
            sizes[str(leaf.dtype)] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return dict(sizes)


def load(path: Path, *, dtype: jnp.dtype | None = None, sharding: Sharding | None = None) -> Transformer:
    """Restores a model as it was saved.

    Args:
      path: a directory that `save` wrote.
      dtype: of float parameters and activations; None keeps what was saved.
      sharding: a mesh and its rules; None for the default device.

    Raises:
      CheckpointError: if something is missing or damaged.
    """
    saved = _read(path)
    chosen = dtype or saved.dtype
    wanted, target = specs(abstract(saved.config, chosen)), {}
    empty = {name: _with_floats(value, chosen) for name, value in saved.weights.items()}
    problems = mismatches(wanted, {name: value.shape for name, value in empty.items()})
    if problems:
        raise CheckpointError(path, problems)
    for name, value in empty.items():
        if sharding is None:
            places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), value)
        else:
            places = shardings(wanted[name], value, sharding, name)
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        target[name] = _leaves(jax.tree.map(place, value, places))
    try:
        restored = _restore((path / _PARAMS).absolute(), target)
    except Exception as error:  # Orbax raises whatever its storage raises
        raise CheckpointError(path / _PARAMS, f"cannot be restored: {_first_line(error)}") from error
    values = {name: _filled(empty[name], leaves) for name, leaves in restored.items()}
    return from_params(saved.config, values, dtype=chosen)


class _Saved(NamedTuple):
    """What jaxopt_llm.json says: the model, its dtype, and its weights as shapes."""

    config: ModelConfig
    dtype: jnp.dtype
    weights: dict[str, Any]


def _read(path: Path) -> _Saved:
    description = read_json(path / MARKER)
    if description.get("version") != _VERSION:
        found = description.get("version")
        raise CheckpointError(path / MARKER, f"version {found!r}; this release reads version {_VERSION}")
    try:
        weights = {name: _empty(entry) for name, entry in description["weights"].items()}
        return _Saved(ModelConfig.from_json(description["config"]), _float(description["dtype"]), weights)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(path / MARKER, f"damaged: {error!r}") from error


def _empty(entry: dict[str, Any]) -> Any:
    """A weight of shapes from what `_describe` wrote."""
    if "value" in entry:
        return _leaf(entry["value"], _float)
    data, scale = _leaf(entry["data"], jnp.dtype), _leaf(entry["scale"], _float)
    bias = _leaf(entry["bias"], _float) if "bias" in entry else None
    weight = QArray(data, scale, bias, bits=entry["bits"], act=_act(entry["act"]))
    features, dtypes = weight.shape[-1], _CODES[weight.bits]
    whole = [features % scale.shape[-1] == 0, weight.act is None or features % (weight.act[1] or 1) == 0]
    if (
        data.dtype not in dtypes
        or scale.shape[:-1] != data.shape[:-1]
        or bias not in (None, scale)
        or not all(whole)
    ):
        raise ValueError(f"parts of a weight do not fit: {entry!r}")
    return weight


def _act(described: Any) -> tuple[int, int | None] | None:
    if described is None:
        return None
    bits, group = described
    per_group = group is None or (type(group) is int and group > 0)
    if not (type(bits) is int and 2 <= bits <= 8 and per_group):
        raise ValueError(f"act={described!r} is no rounding of activations")
    return bits, group


def _leaf(described: Sequence[Any], dtype: Callable[[Any], jnp.dtype]) -> jax.ShapeDtypeStruct:
    shape, name = described
    if not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise ValueError(f"no array has shape {shape!r}")
    return jax.ShapeDtypeStruct(tuple(shape), dtype(name))


def _float(name: Any) -> jnp.dtype:
    dtype = jnp.dtype(name)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name!r} is no float")
    return dtype


def _with_floats(empty: Any, dtype: jnp.dtype) -> Any:
    """A weight of shapes with its values in `dtype`; a quantized one as it is."""
    return empty if isinstance(empty, QArray) else jax.ShapeDtypeStruct(empty.shape, dtype)


def _filled(empty: Any, leaves: dict[str, jax.Array]) -> Weight:
    if not isinstance(empty, QArray):
        return leaves["value"]
    return QArray(leaves["data"], leaves["scale"], leaves.get("bias"), bits=empty.bits, act=empty.act)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
