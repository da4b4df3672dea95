"""The roofline of a decode step: its parts, its bound, what fusions buy."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxopt_llm.evaluate import roofline
from jaxopt_llm.evaluate.roofline import Machine, decode_step, place_of
from jaxopt_llm.kernels import FORMATS
from jaxopt_llm.models import ModelConfig, Rope, abstract, place, quantizable, specs, with_weights
from jaxopt_llm.sharding import MeshSpec, Sharding
from jaxopt_llm.sharding.chips import CHIPS

CONFIG = ModelConfig(
    family="llama", vocab_size=512, d_model=64, d_ff=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_seq_len=256, windows=(None,) * 3, rope=Rope(),
)  # fmt: skip
SLOW = Machine(name="slow", bandwidth=1e6, flops=1e15, measured=False)
CONTEXT = 64


def shapes(format: str | None):
    model = abstract(CONFIG)
    if format:
        rounded = {n: s.shape for n, s in specs(model).items() if quantizable(n, s.shape)}
        model = with_weights(model, {n: FORMATS[format].shapes(shape) for n, shape in rounded.items()})
    return place(model, Sharding(MeshSpec().build(jax.devices()[:1]), CONFIG.units))


@pytest.fixture(scope="module", params=["int8_block", None])
def step(request):
    return decode_step(shapes(request.param), SLOW, rows=2, context=CONTEXT)


def test_totals_are_those_of_the_parts(step):
    for what in ("launched", "read", "written", "flops", "bound_s"):
        whole = sum(part.count * getattr(part, what) for part in step.parts)
        assert whole == pytest.approx(getattr(step, what))
    assert sum(part.share for part in step.parts) == pytest.approx(1)
    assert step.bound_s == pytest.approx((step.read + step.written) / SLOW.bandwidth)
    assert step.tokens_per_s == pytest.approx(2 / step.bound_s)


def test_flops_follow_from_the_shapes(step):
    """Two a weight and row; of attention four a query head, its width and token, whatever runs them."""
    weights = {name: spec.shape for name, spec in specs(shapes(None)).items()}
    count = lambda word: sum(s[0] * s[1] for n, s in weights.items() if word in n and len(s) == 2)
    of = lambda word: sum(part.count * part.flops for part in step.parts if word in part.name)
    assert of("mlp") == 2 * 2 * count("mlp")
    assert of("head") == 2 * 2 * count("head")
    seen = 4 * 2 * CONFIG.q_width * CONTEXT * CONFIG.num_layers
    assert of("attention") == pytest.approx(2 * 2 * count("attention") + seen, rel=0.01)


def test_layers_alike_share_a_row():
    step = decode_step(shapes("int8_block"), SLOW, context=CONTEXT, fusions=False)
    rows = {part.name: part.count for part in step.parts}
    assert rows["layers.*.mlp"] == CONFIG.num_layers
    assert sum(count for name, count in rows.items() if name.endswith("attention")) == CONFIG.num_layers
    assert step.fusions == []


def test_fusions_save_launches():
    step = decode_step(shapes("int8_block"), SLOW, context=CONTEXT)
    saved = {one.name: one.launched_without - one.launched for one in step.fusions}
    assert set(saved) == {"qkv", "gate_up", "norm", roofline.SAMPLING}
    assert saved["norm"] == 2 * CONFIG.num_layers
    assert all(count > 0 for count in saved.values())
    assert all(one.nbytes_without >= one.nbytes for one in step.fusions)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("jit(step)/layers.12/attention/ffi_call", ("attention", 12)),
        ("jit(step)/jit(main)/layers.0/mlp/jit(silu)/mul", ("mlp", 0)),
        ("jit(step)/head/dot_general", ("head", None)),
        ("jit(step)/sampling/cond/branch_1_fun/add", ("sampling", None)),
        ("jit(step)/layers.3/add", ("layer", 3)),
        ("jit(step)/layers.3", ("layer", 3)),
        ("", ("other", None)),
    ],
)
def test_places(scope, expected):
    assert place_of(scope) == expected


def test_the_slower_of_bytes_and_products_bounds():
    machine = Machine.published(CHIPS["v5e"])
    assert machine.seconds(819e9, 0) == machine.seconds(0, 197e12) == machine.seconds(819e9, 197e12) == 1
    assert Machine.published(CHIPS["tpu7x"]).bandwidth == CHIPS["tpu7x"].hbm_bandwidth / 2


def test_this_machine_is_measured():
    machine = Machine.here(jnp.dtype(jnp.float32))
    assert machine.measured
    assert 1e8 < machine.bandwidth < 1e14
    assert 1e8 < machine.flops < 1e17


def test_no_rows():
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        decode_step(shapes(None), SLOW, rows=0)


def test_figures_are_plain():
    """So that they go into JSON."""
    step = decode_step(shapes("int8_block"), SLOW, context=CONTEXT, fusions=False)
    kinds = {type(value) for part in step.parts for value in dataclasses.astuple(part)}
    assert kinds <= {str, int, float}
