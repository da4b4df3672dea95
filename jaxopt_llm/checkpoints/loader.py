"""`load`: any checkpoint to a model and its tokenizer, tensor by tensor."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_llm.checkpoints import assemble, gguf_model, hf, orbax, safetensors
from jaxopt_llm.checkpoints import gguf as gguf_file
from jaxopt_llm.checkpoints.adapters import Adapter, changed, load_adapter
from jaxopt_llm.checkpoints.files import CheckpointError, TensorSource, refuse_pickles
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.checkpoints.offload import Offload
from jaxopt_llm.checkpoints.resolve import resolve
from jaxopt_llm.kernels import Weight, quantization_format
from jaxopt_llm.kernels.formats import Format
from jaxopt_llm.models import (
    ModelConfig,
    Transformer,
    abstract,
    from_params,
    quantizable,
    specs,
    stage_layers,
    weights,
    widest_mesh,
    with_weights,
)
from jaxopt_llm.sharding import MeshSpec, Sharding
from jaxopt_llm.text import Tokenizer

Progress = Callable[[int, int], None]

AUTO = "auto"  # in place of a mesh


def load(
    source: str | Path,
    *,
    dtype: Any = None,
    quantize: str | None = None,
    mesh: str | MeshSpec | jax.sharding.Mesh | None = None,
    adapter: str | Path | Adapter | None = None,
    offload: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Transformer, Tokenizer | None]:
    """Loads a checkpoint, mapping its files and placing tensor by tensor.

    Peak memory stays under the model's size in memory plus 1.5 times its largest tensor (our own format, which
    Orbax reads, may take up to 2.5 times its largest tensor).

    Args:
      source: an alias, a directory (Hugging Face or our own), a `.gguf` file, `hf:org/name[@revision]`.
      dtype: of parameters and activations. None is bfloat16 where the chip has it (float16 on a T4), float32
        on a CPU. "native" keeps the codes of GGUF's Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 without loss and those of
        Q4_K, Q5_K and Q6_K with scales multiplied out (5 and 6 bits take a byte); on a CPU activations are then
        rounded in groups of 32, as llama.cpp does. It also keeps what compressed-tensors packed, and rounds activations
        where that says so; otherwise the model gets the floats that codes stand for.
      quantize: a rounding to nearest that each tensor goes through while it is read: a format that `jo.quantize` has.
      mesh: `"tensor=4"`, a `MeshSpec` or a `jax.sharding.Mesh` of its axes, to place parameters shard by shard;
        `"auto"` for as many tensor shards as divide the model, over the devices that there are.
        `tensor` and `expert` split the model. `data` leaves it whole on each of its devices. `stage` gives each of its
        stages some layers, about as many as take equally long, or as `"stage=20+12"` says.
      adapter: one in PEFT's format, or where it lies: merged while the weights are read, before they are rounded.
      offload: a folder on a disk with room for the model, whose parameters are then mapped from a file there instead
        of held: for a model larger than memory on the CPU. The file has no name, and goes with the model.
      progress: called with (parameters placed, of all).

    Returns:
      the model, and its tokenizer (None where a Hugging Face directory has none).

    Raises:
      CheckpointError: if files are damaged, or do not fit the model; all problems are listed together.
      ValueError: for a dtype, format or mesh that does not exist, does not divide or would split nothing.
    """
    path = resolve(str(source))
    native = isinstance(dtype, str) and dtype == "native"
    rounding = None if quantize is None else quantization_format(quantize)
    if native and rounding:
        raise ValueError('dtype="native" keeps the file\'s own rounding; drop it, or drop quantize')
    if native and adapter is not None:
        raise ValueError(
            'dtype="native" keeps the file\'s own codes, and an adapter changes them; use quantize'
        )
    if offload is not None and (mesh is not None or jax.default_backend() != "cpu"):
        raise ValueError("offload maps parameters into a CPU's memory; drop it on an accelerator or a mesh")
    disk = None if offload is None else Offload(offload)
    own = load_adapter(adapter) if isinstance(adapter, str | Path) else adapter
    chosen = default_dtype() if dtype is None or native else float_dtype(dtype)
    if orbax.is_checkpoint(path):
        if native or rounding:
            raise ValueError(
                f"{path} is in our own format and loads as it was saved; use jo.quantize afterwards"
            )
        sharding = None if mesh is None else mesh_sharding(mesh, orbax.read_config(path))
        model = orbax.load(path, dtype=None if dtype is None else chosen, sharding=sharding)
        model = own.merge(model) if own else model
        if disk:
            model = with_weights(model, {name: disk.keep(value) for name, value in weights(model).items()})
        return model, read_tokenizer(path)
    with _open(path) as files:
        config, locate = _read_config(files, path)
        wanted = specs(abstract(config, chosen))
        sharding = None if mesh is None else mesh_sharding(mesh, config, rounding)
        located = dict(locate(files, config, wanted))
        if own:
            config, changes = own.fit(config)
            wanted = specs(abstract(config, chosen))
            if not config.tied:
                located.setdefault("head.weight", located["embed.weight"])
            located |= {name: changed(located[name], change) for name, change in changes.items()}
        values: dict[str, Weight] = {}
        placed, total = 0, sum(_size(entry) for entry in located.values())
        for name, entry in located.items():
            values[name] = assemble.place(
                name,
                wanted[name],
                entry,
                dtype=chosen,
                rounding=rounding if quantizable(name, entry.shape) else None,
                native=native,
                sharding=sharding,
                offload=disk,
            )
            placed += _size(entry)
            if progress:
                progress(placed, total)
        return from_params(config, values, dtype=chosen), _tokenizer(files, path)


def default_dtype() -> jnp.dtype:
    """bfloat16 where the chip has it, float16 on older GPUs (T4), float32 on a CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.dtype(jnp.float32)
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) < 8:
        return jnp.dtype(jnp.float16)
    return jnp.dtype(jnp.bfloat16)


def float_dtype(dtype: Any) -> jnp.dtype:
    """A float dtype by its name.

    Raises:
      ValueError: if it is none.
    """
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    if result not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be native, {', '.join(str(d) for d in _DTYPES)}, or None")
    return result


_DTYPES = [jnp.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)]


def mesh_sharding(
    mesh: str | MeshSpec | jax.sharding.Mesh, config: ModelConfig, rounding: Format | None = None
) -> Sharding:
    """Where the parameters of a model go on a mesh, which `auto` chooses; `rounding` is that of its weights."""
    if mesh == AUTO:
        mesh = widest_mesh(config, jax.device_count(), rounding)
    if isinstance(mesh, jax.sharding.Mesh):
        built, layers = mesh, None
    else:
        spec = MeshSpec.parse(mesh)
        built, layers = spec.build(), spec.stage_layers
    sharding = Sharding(built, config.units)
    if sharding.stages > 1:
        layers = layers or stage_layers(config, sharding.stages, rounding=rounding)
        sharding = dataclasses.replace(sharding, stage_layers=layers)
    return sharding


def read_config(source: str | Path) -> tuple[ModelConfig, Path]:
    """The config of a checkpoint and the path it resolved to; no weights are read."""
    path = resolve(str(source))
    if orbax.is_checkpoint(path):
        return orbax.read_config(path), path
    if path.suffix == ".gguf":
        with gguf_file.open_file(path) as files:
            return gguf_model.read_config(files), path
    return hf.read_config(path), path


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of a checkpoint's tensors by the type they are stored in, from its headers; none without weights.

    Types go by their format's own words: "BF16" in safetensors, "Q4_K" in GGUF, "bfloat16" in our own.
    """
    if orbax.is_checkpoint(path):
        return orbax.stored_bytes(path)
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        refuse_pickles(path)
        return {}
    with _open(path) as files:
        sizes: Counter[str] = Counter()
        for tensor in files.values():
            sizes[tensor.storage] += tensor.nbytes
        return dict(sizes)


def file_bytes(path: Path) -> int | None:
    """Bytes of a checkpoint's file or files; None for a remote one.

    Of a Hugging Face directory the safetensors alone: it may hold the same weights in other forms too.
    """
    if not isinstance(path, Path):  # remote
        return None
    if path.is_file():
        return path.stat().st_size
    files = list(path.glob("*.safetensors")) or path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _open(path: Path) -> TensorSource:
    if path.suffix == ".gguf":
        return gguf_file.open_file(path)
    if path.is_dir():
        hf.read_json(path / hf.CONFIG)  # a directory that holds no model says so, not what files it lacks
        return safetensors.open_directory(path)
    refuse_pickles(path)
    raise CheckpointError(path, "not a checkpoint: name a directory or a .gguf file")


def _read_config(files: TensorSource, path: Path) -> tuple[ModelConfig, Callable[..., Mapping[str, Located]]]:
    if path.suffix == ".gguf":
        return gguf_model.read_config(files), gguf_model.locate
    return hf.read_config(path), hf.locate


def _tokenizer(files: TensorSource, path: Path) -> Tokenizer | None:
    if path.suffix == ".gguf":
        absent = files.metadata.get("tokenizer.ggml.model", "no_vocab") == "no_vocab"
        return None if absent else Tokenizer.from_gguf(files.metadata)
    return read_tokenizer(path)


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory; None where it has no tokenizer files at all."""
    if not any(directory.glob("tokenizer*")) and not (directory / "vocab.json").exists():
        return None
    return Tokenizer.from_directory(directory)


def _size(entry: Located) -> int:
    return math.prod(entry.shape)
