"""Floor 3: checkpoints in and out."""

from jaxopt_llm.checkpoints.adapter_config import CONFIG as ADAPTER_MARKER
from jaxopt_llm.checkpoints.adapter_export import export as export_adapter
from jaxopt_llm.checkpoints.adapters import Adapter, load_adapter
from jaxopt_llm.checkpoints.files import CheckpointError
from jaxopt_llm.checkpoints.gguf_export import export as export_gguf
from jaxopt_llm.checkpoints.hf_export import export as export_hf
from jaxopt_llm.checkpoints.loader import (
    AUTO,
    default_dtype,
    file_bytes,
    float_dtype,
    load,
    mesh_sharding,
    read_config,
    read_tokenizer,
    stored_bytes,
)
from jaxopt_llm.checkpoints.offload import Offload
from jaxopt_llm.checkpoints.orbax import is_checkpoint as is_own
from jaxopt_llm.checkpoints.orbax import save
from jaxopt_llm.checkpoints.parts import read_weights, write_weights
from jaxopt_llm.checkpoints.resolve import ALIASES, resolve

__all__ = [
    "ADAPTER_MARKER",
    "ALIASES",
    "AUTO",
    "Adapter",
    "CheckpointError",
    "Offload",
    "default_dtype",
    "export_adapter",
    "export_gguf",
    "export_hf",
    "file_bytes",
    "float_dtype",
    "is_own",
    "load",
    "load_adapter",
    "mesh_sharding",
    "read_config",
    "read_tokenizer",
    "read_weights",
    "resolve",
    "save",
    "stored_bytes",
    "write_weights",
]
