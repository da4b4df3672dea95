"""Floor 2: one `Transformer` from one `ModelConfig`, families as thin files."""

from jaxopt_llm.models.batch import Batch, Cache, init_cache
from jaxopt_llm.models.captured import Captured, capture
from jaxopt_llm.models.config import Experts, ModelConfig, Rope
from jaxopt_llm.models.layers import flat_params, weights
from jaxopt_llm.models.packed import FUSIONS, as_run, mesh_of, packed
from jaxopt_llm.models.params import (
    ParamSpec,
    abstract,
    apply,
    bits_per_parameter,
    from_params,
    mismatches,
    num_bytes,
    num_params,
    num_zeros,
    place,
    quantizable,
    shardings,
    specs,
    widest_mesh,
    with_weights,
    without_layers,
)
from jaxopt_llm.models.stages import num_stages, stage_layers, stages
from jaxopt_llm.models.transformer import Transformer

__all__ = [
    "FUSIONS",
    "Batch",
    "Cache",
    "Captured",
    "Experts",
    "ModelConfig",
    "ParamSpec",
    "Rope",
    "Transformer",
    "abstract",
    "apply",
    "as_run",
    "bits_per_parameter",
    "capture",
    "flat_params",
    "from_params",
    "init_cache",
    "mesh_of",
    "mismatches",
    "num_bytes",
    "num_params",
    "num_stages",
    "num_zeros",
    "packed",
    "place",
    "quantizable",
    "shardings",
    "specs",
    "stage_layers",
    "stages",
    "weights",
    "widest_mesh",
    "with_weights",
    "without_layers",
]
