"""The engine's decode step compiled for H100s that are not there: what the program holds, reads and copies.

Layers of Llama 3 8B's size, 8 slots of 2,048 tokens. As the TPU's program (`engine/test_ahead.py`) it copies nothing
and reads everything once, keys and values in the kernel of `kernels/gpu`: of pages, its operands, all are counted. A
product of few rows is split along the sum, and its parts are written and added.

Without a GPU the compiler does not time alternatives: on one it may choose cuBLAS for a product, which would need the
dequantized weight.
"""

import functools
import math

import jax.numpy as jnp
import pytest

from jaxopt_llm.engine import EngineConfig, inputs
from jaxopt_llm.engine.ahead import Ahead, compile_step
from jaxopt_llm.evaluate.program import Operation, operations
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import ModelConfig, Rope, abstract, place, specs
from jaxopt_llm.sharding import MeshSpec, Sharding, topologies

pytest.importorskip("jax_plugins.xla_cuda12", reason="needs JAX's CUDA plugin: make test-cuda")
pytestmark = [
    pytest.mark.verify,
    pytest.mark.filterwarnings(
        "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
    ),  # since jax 0.12
]

CONFIG = ModelConfig(
    family="llama", vocab_size=32768, d_model=4096, d_ff=14336, num_layers=2, num_heads=32, num_kv_heads=8,
    head_dim=128, max_seq_len=2048, windows=(None, None), rope=Rope(),
)  # fmt: skip
DECODE = inputs.Shape(rows=8, tokens=8, steps=1, full=False)
SMALL, LARGE = 2**15, 2**20  # tokens in the cache
each_program = pytest.mark.parametrize(("format", "tensor"), [(None, 1), (None, 4), ("int8", 1), ("int8", 4)])


def model(format: str | None, tensor: int):
    shapes = abstract(CONFIG, jnp.bfloat16, format and FORMATS[format])
    mesh = MeshSpec(tensor=tensor).build(topologies.gpu("h100", tensor))
    return place(shapes, Sharding(mesh, CONFIG.units))


@functools.cache
def compiled(
    format: str | None,
    tensor: int,
    tokens: int = SMALL,
    shape: inputs.Shape = DECODE,
    cache: str | None = None,
) -> tuple[Ahead, list[Operation]]:
    sizes = EngineConfig(max_slots=DECODE.rows, cache_tokens=tokens, cache_dtype=cache)
    ahead = compile_step(model(format, tensor), sizes, shape)
    return ahead, operations(ahead.compiled.as_text())


def attending(one: Operation) -> bool:
    return one.kernel == "__gpu$xla.gpu.triton" and "/attention/paged_attention/" in one.scope


def weights_read(ahead: Ahead, format: str | None, tensor: int) -> int:
    """Bytes of all weights but the table of embeddings, of which a step reads a row."""
    return ahead.weight_bytes - CONFIG.vocab_size // tensor * CONFIG.d_model * (1 if format else 2)


def total(found: list[Operation], what: str) -> int:
    return sum(getattr(one, what) for one in found)


@each_program
def test_no_weight_is_copied(format, tensor):
    """Neither dequantized nor in another order: no float array of a weight's size is made in main memory."""
    _, found = compiled(format, tensor)
    weights = [spec.shape for spec in specs(model(format, tensor)).values() if len(spec.shape) == 2]
    sizes = {math.prod(shape) // parts for shape in weights for parts in (1, tensor)}
    arrays = [shape for one in found for shape in one.outputs]
    made = [shape for shape in arrays if shape.dtype in ("bf16", "f32")]
    assert not [shape for shape in made if math.prod(shape.dims) in sizes]


@each_program
def test_the_cache_stays_where_it_is(format, tensor):
    ahead, found = compiled(format, tensor)
    assert ahead.compiled.memory_analysis().alias_size_in_bytes >= ahead.cache_bytes
    updates = [one for one in found if "/attention/scatter" in one.scope]
    assert len(updates) == 2 * CONFIG.num_layers
    assert not [one.name for one in updates if one.opcode != "fusion"]
    assert total(updates, "written") < 1e6
    assert not [one.name for one in found if one.opcode == "while"]
    assert total(found, "written") < 2.5e7  # the cache: 67 and 268 MB


@each_program
def test_temporaries_do_not_grow_with_the_pages(format, tensor):
    (small, _), (large, _) = compiled(format, tensor), compiled(format, tensor, LARGE)
    few, many = (ahead.compiled.memory_analysis().temp_size_in_bytes for ahead in (small, large))
    assert many == few


@each_program
def test_weights_are_read_once(format, tensor):
    ahead, found = compiled(format, tensor)
    others = [one for one in found if not attending(one)]
    products = [one for one in others if one.flops]
    weights = weights_read(ahead, format, tensor)
    assert weights <= total(products, "read") <= 1.01 * weights
    assert total(others, "read") - total(products, "read") < 3.5e7  # sums of parts, norms; 13 MB to sample
    assert total(products, "flops") == pytest.approx(
        2 * DECODE.rows * weights / (1 if format else 2), rel=0.02
    )


@each_program
def test_pages_are_read_once(format, tensor):
    """Where they lie: by a kernel a layer, and by nothing else."""
    ahead, found = compiled(format, tensor)
    kernels = [one for one in found if attending(one)]
    assert len(kernels) == CONFIG.num_layers
    assert ahead.cache_bytes <= total(kernels, "read") <= 1.01 * ahead.cache_bytes
    queries = CONFIG.num_heads // CONFIG.num_kv_heads
    assert total(kernels, "flops") == 2 * queries * ahead.cache_bytes // 2  # each bfloat16 meets every query
    assert not [one.name for one in found if "/attention/gather" in one.scope]
    if tensor == 1:  # else what each device does to sample weighs more, of so few layers
        assert total(found, "read") <= 1.05 * (weights_read(ahead, format, tensor) + ahead.cache_bytes)


@pytest.mark.parametrize(
    ("shape", "cache"),
    [(inputs.Shape(8, 8, 4, False), None), (inputs.Shape(8, 128, 1, True), "int8")],
    ids=["steps", "prompts"],
)
def test_other_shapes_keep_the_cache_too(shape, cache):
    """Several steps in a loop; chunks of prompts, into codes with their scales."""
    (small, _), (large, _) = (compiled(None, 1, tokens, shape, cache) for tokens in (SMALL, LARGE))
    few, many = (ahead.compiled.memory_analysis() for ahead in (small, large))
    assert few.alias_size_in_bytes >= small.cache_bytes
    assert (
        abs(many.temp_size_in_bytes - few.temp_size_in_bytes) < 1e5
    )  # of gigabytes: a few KB differ in alignment


def test_a_gpu_that_is_not_there():
    device, *others = topologies.gpu("h100", 8)
    assert device.device_kind == "NVIDIA H100 80GB HBM3" and len(others) == 7
