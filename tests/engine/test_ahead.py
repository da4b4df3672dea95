"""The engine's step compiled for TPUs that are not there: what the program holds, reads and keeps in place."""

import functools
import math

import jax.numpy as jnp
import pytest

from jaxopt_llm.engine import EngineConfig, inputs
from jaxopt_llm.engine.ahead import Ahead, compile_step
from jaxopt_llm.evaluate.program import Operation, operations
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import Experts, ModelConfig, Rope, abstract, place, specs
from jaxopt_llm.sharding import MeshSpec, Sharding, topologies

LLAMA = ModelConfig(
    family="llama", vocab_size=1024, d_model=512, d_ff=1024, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=128,
    max_seq_len=2048, windows=(None, None), rope=Rope(),
)  # fmt: skip
GEMMA = ModelConfig(
    family="gemma2", vocab_size=1024, d_model=512, d_ff=1024, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=256,
    max_seq_len=2048, windows=(512, None), rope=Rope(), norm_offset=1.0, post_norm=True, activation="gelu_tanh",
    attention_softcap=50.0, logit_softcap=30.0, scale_embedding=True, tied=True,
)  # fmt: skip
MIXTRAL = ModelConfig(
    family="mixtral", vocab_size=1024, d_model=512, d_ff=512, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64,
    max_seq_len=2048, windows=(None,), rope=Rope(), experts=Experts(count=8, per_token=2, d_ff=512, layers=(True,)),
)  # fmt: skip
DECODE = inputs.Shape(rows=8, tokens=8, steps=1, full=False)
SEVERAL = DECODE._replace(steps=4)
SMALL, LARGE = 2**15, 2**20  # tokens in the cache
# Each chip, model, form of weights and size of mesh with each of the others' at least once.
PROGRAMS = [
    (LLAMA, "int8", "v5e", 1),
    (LLAMA, None, "v6e", 4),
    (GEMMA, None, "v5e", 4),
    (GEMMA, "int8", "v6e", 1),
]
each_program = pytest.mark.parametrize(
    "what", PROGRAMS, ids=[f"{c.family}-{f or 'bf16'}-{v}-{n}" for c, f, v, n in PROGRAMS]
)


def model(config: ModelConfig, format: str | None, version: str, tensor: int):
    shapes = abstract(config, jnp.bfloat16, format and FORMATS[format])
    mesh = MeshSpec(tensor=tensor).build(topologies.tpu(version))
    return place(shapes, Sharding(mesh, config.units))


@functools.cache
def compiled(config, format, version, tensor, *, tokens=SMALL, shape=DECODE) -> tuple[Ahead, list[Operation]]:
    sizes = EngineConfig(max_slots=8, cache_tokens=tokens)
    ahead = compile_step(model(config, format, version, tensor), sizes, shape)
    return ahead, operations(ahead.compiled.as_text())


@each_program
def test_no_weight_is_copied(what):
    """Neither dequantized nor in another order: no float array of a weight's size is made in main memory."""
    _, found = compiled(*what)
    weights = [spec.shape for spec in specs(model(*what)).values() if len(spec.shape) == 2]
    sizes = {math.prod(shape) // parts for shape in weights for parts in (1, what[3])}
    arrays = [shape for one in found if not one.opcode.endswith("-start") for shape in one.outputs]
    made = [shape for shape in arrays if shape.main and shape.dtype in ("bf16", "f32")]
    assert not [shape for shape in made if math.prod(shape.dims) in sizes]


@each_program
def test_the_cache_stays_where_it_is(what):
    ahead, found = compiled(*what)
    assert ahead.compiled.memory_analysis().alias_size_in_bytes >= ahead.cache_bytes
    assert not [one.name for one in found if one.opcode == "while"]
    assert sum(one.written for one in found) < 1e6


@each_program
def test_temporaries_do_not_grow_with_the_pages(what):
    (small, _), (large, _) = compiled(*what), compiled(*what, tokens=LARGE)
    few, many = (ahead.compiled.memory_analysis().temp_size_in_bytes for ahead in (small, large))
    # Activations of some 100 KB may move to and from the chip's own memory as the compiler's estimates change.
    assert abs(many - few) < 1e-3 * (large.cache_bytes - small.cache_bytes)


@each_program
def test_bytes_are_read_once(what):
    config, format, _, tensor = what
    ahead, found = compiled(*what)
    kernels = [one for one in found if "ragged_paged_attention" in one.scope and one.opcode == "custom-call"]
    heads = 4 // tensor if config is GEMMA else 1  # wide ones go one by one
    assert len(kernels) == config.num_layers * heads
    width = 1 if format else 2
    table = (
        0 if config.tied else config.vocab_size // tensor * config.d_model * width
    )  # of which a step reads a row
    weights = ahead.weight_bytes - table
    attention, all = (sum(one.read for one in part) for part in (kernels, found))
    assert attention <= 1.01 * ahead.cache_bytes
    assert all - attention <= 1.05 * weights
    products = sum(one.flops for one in found if one not in kernels)
    assert products == pytest.approx(2 * DECODE.rows * weights / width, rel=0.02)
    queries = config.num_heads // config.num_kv_heads
    seen = 2 * queries * ahead.cache_bytes // 2  # each number of the cache, in bfloat16, meets every query
    assert sum(one.flops for one in kernels) == pytest.approx(seen, rel=0.02)


def test_several_steps_copy_nothing_and_read_once_a_step():
    """A loop is one operation, with what its body does once."""
    ahead, found = compiled(LLAMA, None, "v5e", 1, shape=SEVERAL)
    loop = max(found, key=lambda one: one.read)
    assert loop.opcode == "while"
    table = LLAMA.vocab_size * LLAMA.d_model * 2
    assert loop.read <= 1.05 * (ahead.weight_bytes - table + ahead.cache_bytes)
    assert sum(one.read for one in found if one is not loop) < 1e6
    assert sum(one.written for one in found) < 1e6


@pytest.mark.parametrize("shape", [SEVERAL, inputs.Shape(8, 128, 1, True)], ids=["steps", "prompts"])
def test_other_shapes_compile(shape):
    ahead, _ = compiled(LLAMA, None, "v5e", 1, shape=shape)
    assert ahead.compiled.memory_analysis().alias_size_in_bytes >= ahead.cache_bytes


def test_experts_and_heads_that_are_padded():
    with pytest.warns(UserWarning, match="pages hold 4 of width 128, 2.67 times the bytes"):
        ahead, found = compiled(MIXTRAL, None, "v6e", 1)
    assert ahead.cache_bytes == SMALL * 2 * 4 * 128 * 2
    kernels = [one.scope for one in found if one.kernel == "tpu_custom_call"]
    assert sum("megablox" in scope or "gmm" in scope for scope in kernels) == 3


def test_codes_in_the_cache_are_refused():
    with pytest.raises(ValueError, match="int8 keys and values need one scale a tensor on a TPU"):
        compile_step(model(LLAMA, None, "v5e", 1), EngineConfig(cache_dtype="int8"), DECODE)
