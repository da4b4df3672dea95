"""Sizes of pruned models: given ones are checked, found ones fill their share and no more."""

import functools

import pytest

from jaxopt_llm.models import ModelConfig, Rope, num_params
from jaxopt_llm.models.params import abstract
from jaxopt_llm.prune import Shape, body_params, fit
from tests import exportable

SMOLLM2 = ModelConfig(  # a third of its layers
    family="llama",
    vocab_size=49152,
    d_model=576,
    d_ff=1536,
    num_layers=10,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_seq_len=8192,
    windows=(None,) * 10,
    rope=Rope(),
    tied=True,
)


@functools.cache
def smollm2():
    return abstract(SMOLLM2)


def params(d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3, num_layers=10):
    """Of the layers and the final norm, by hand."""
    heads = 2 * d_model * num_heads * 64 + 2 * d_model * num_kv_heads * 64
    return num_layers * (heads + 3 * d_model * d_ff + 2 * d_model) + d_model


def test_the_body_is_all_but_the_embedding():
    assert body_params(smollm2()) == params() == num_params(smollm2()) - 49152 * 576


@pytest.mark.parametrize(
    "axes", [("mlp",), ("mlp", "heads"), ("layers",), ("embed", "mlp"), ("mlp", "heads", "embed", "layers")]
)
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_a_shape_fills_its_share(axes, target):
    shape = fit(smollm2(), target, axes=axes, multiple=8)
    sizes = shape.resolve(SMOLLM2, 8)
    share = params(**sizes) / params()
    assert sizes["d_model"] % sizes["num_heads"] == 0
    slack = 1 / 10 if axes == ("layers",) else 0.02
    assert target - slack < share <= target
    fields = {"mlp": "d_ff", "heads": "num_heads", "embed": "d_model", "layers": "num_layers"}
    for axis, field in fields.items():
        assert (getattr(shape, field) is None) == (axis not in axes)


def test_axes_are_cut_evenly():
    assert fit(smollm2(), 0.7) == Shape(num_heads=6, d_ff=1048)
    assert fit(smollm2(), 0.7, multiple=128) == Shape(num_heads=6, d_ff=1024)


def test_of_heads_that_stand_alone_groups_go():
    shape = fit(exportable.model("llama", num_key_value_heads=6), 0.6, axes=("heads", "mlp"))
    assert shape.num_heads == shape.num_kv_heads < 6


@pytest.mark.parametrize("target", [0.0, 1.0, 1.2, -0.5, float("nan")])
def test_a_share_outside_its_bounds_is_refused(target):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        fit(smollm2(), target)


@pytest.mark.parametrize(
    ("target", "axes", "message"),
    [
        (0.1, ("mlp",), r"target_params=0.1 cannot be reached by cutting mlp alone; name more axes"),
        (0.7, (), r"axes=\(\) must be some of mlp, heads, embed, layers"),
    ],
)
def test_a_share_that_cannot_be_had_is_refused(target, axes, message):
    with pytest.raises(ValueError, match=message):
        fit(smollm2(), target, axes=axes)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="must be some of mlp, heads, embed, layers"):
        fit(smollm2(), 0.7, axes=("depth",))


def test_channels_of_experts_are_not_cut():
    model = exportable.model("mixtral")
    with pytest.raises(ValueError, match="mixtral has experts, whose channels are not cut; leave out mlp"):
        fit(model, 0.7)
    with pytest.raises(ValueError, match="mixtral has experts"):
        Shape(d_ff=8).resolve(model.config)
    assert fit(model, 0.7, axes=("embed",)).d_model


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(d_ff=2000), "d_ff=2000 must lie between 1 and the model's 1536"),
        (Shape(d_ff=0), "d_ff=0 must lie between 1"),
        (Shape(d_ff=1000), "d_ff=1000 must be a multiple of 64; try d_ff=1024"),
        (Shape(d_model=500), "d_model=500 must be a multiple of 64; try d_model=512"),
        (Shape(num_heads=7), "num_heads=7 must be a multiple of num_kv_heads=3, with at most 3 query heads"),
        (Shape(num_heads=8, num_kv_heads=2), "num_heads=8 must be .* try num_heads=6"),
        (Shape(num_layers=11), "num_layers=11 must lie between 1 and the model's 10"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        shape.resolve(SMOLLM2, 64)


def test_a_size_that_is_not_cut_needs_no_multiple():
    assert Shape(num_layers=8).resolve(SMOLLM2, 100)["d_ff"] == 1536
