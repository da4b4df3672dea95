"""AWQ and SmoothQuant: folds that change nothing, and scales against the papers' formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.calibrate import Statistics, layer_weights, walk
from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import weights, with_weights
from jaxopt_llm.quantize.awq import AWQ, awq_scale
from jaxopt_llm.quantize.clipping import grid, round_on
from jaxopt_llm.quantize.folds import Fold, folds
from jaxopt_llm.quantize.smoothquant import SmoothQuant

RANDOM = np.random.default_rng(0)
WIDTH = 64
MIX = RANDOM.standard_normal((WIDTH, WIDTH)) * np.exp(1.5 * RANDOM.standard_normal(WIDTH))
X = RANDOM.standard_normal((300, WIDTH)) @ MIX
WEIGHTS = [RANDOM.standard_normal((rows, WIDTH)) for rows in (24, 8)]
PLAIN = Fold("mlp_norm", ("mlp.gate", "mlp.up"), (1, 1, WIDTH))
HEADS = Fold("attention.v", ("attention.o",), (2, 4, WIDTH // 8))  # four query heads read each of two


def array(values):
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("which", ["model", "rich", "post_normed"])
def test_folds_change_nothing(which, ids, request):
    model = request.getfixturevalue(which)
    changed = {}
    for layer in range(model.config.num_layers):
        inside = layer_weights(model, layer)
        for fold in folds(model.config, layer):
            scale = np.exp(
                RANDOM.standard_normal(fold.pool(inside[f"{fold.products[0]}.weight"][0], jnp.max).shape)
            )
            inside |= fold.apply(inside, array(scale))
        changed |= {f"layers.{layer}.{name}": value for name, value in inside.items()}
    folded = with_weights(model, changed)
    before, after = model(ids), folded(ids)
    np.testing.assert_allclose(after, before, atol=1e-4 * float(jnp.abs(before).max()))
    moved = {name for name, value in weights(folded).items() if not np.allclose(value, weights(model)[name])}
    untouched = ("embed", "final_norm", "post_norm", "q_norm", "k_norm", "o.bias", "down.bias", "gate.bias")
    if which == "post_normed":
        untouched += ("q.weight", "k.weight", "gate.weight")
    assert moved == {name for name in weights(model) if not any(part in name for part in untouched)} - {
        name for name in weights(model) if name.endswith(("q.bias", "k.bias"))
    }


def test_heads_of_a_group_share_their_scale():
    scale = HEADS.spread(jnp.arange(16.0))
    np.testing.assert_array_equal(scale, np.tile(np.arange(16.0).reshape(2, 1, 8), (1, 4, 1)).reshape(-1))
    np.testing.assert_array_equal(HEADS.pool(scale, jnp.mean), np.arange(16.0))


@pytest.mark.parametrize("name", ["int4_g32_zero", "int3_g32"])
@pytest.mark.parametrize("fold", [PLAIN, HEADS], ids=["norm", "heads"])
def test_awq_takes_the_best_strength(name, fold):
    """Equations 4 and 5 of arXiv:2306.00978: `argmin_a |Q(W s) x / s - W x|` with `s = mean|x|**a`."""
    form = quantization_format(name)
    groups, repeats, width = fold.repeats
    mean = np.abs(X).mean(0).reshape(groups, repeats, width).mean(1)
    spread = lambda scale: np.tile(scale[:, None], (1, repeats, 1)).reshape(-1)

    def loss(scale):
        rounded = [
            np.float64(form.quantize(array(w * spread(scale))).dequantize()) / spread(scale) for w in WEIGHTS
        ]
        return sum(np.square(X @ (new - w).T).sum() for new, w in zip(rounded, WEIGHTS, strict=True))

    scales = [mean ** (step / 20) for step in range(20)]
    scales = [scale / np.sqrt(scale.max() * scale.min()) for scale in scales]
    losses = list(map(loss, scales))
    best = int(np.argmin(losses))
    assert losses[best] < 0.95 * losses[0], "scaling pays here"
    ours = awq_scale(
        [array(w) for w in WEIGHTS],
        fold.pool(array(np.abs(X).mean(0)), jnp.mean),
        array(X.T @ X),
        fold=fold,
        format=form,
    )
    np.testing.assert_allclose(ours, scales[best].reshape(-1), rtol=1e-4)


@pytest.mark.parametrize("name", ["int4_g32_zero", "int4_g32", "int4_g32_min", "int8"])
def test_clipping_takes_the_best_share(name):
    """Each group by itself: the share of its range whose rounding changes its part of the outputs least."""
    form, w = quantization_format(name), WEIGHTS[0]
    group = form.group or WIDTH
    outputs = lambda values, g: values[:, g * group : (g + 1) * group] @ X[:, g * group : (g + 1) * group].T
    losses = []
    for share in 1 - np.arange(20) / 40:
        low, high = (share * part for part in form.span(array(w).reshape(len(w), -1, group)))
        rounded = np.float64(round_on(array(w), *form.grid(low, high), format=form).dequantize())
        losses.append([np.square(outputs(rounded - w, g)).sum(1) for g in range(WIDTH // group)])
    ours = np.float64(
        round_on(array(w), *grid(array(w), array(X.T @ X), format=form, clip=True), format=form).dequantize()
    )
    found = [np.square(outputs(ours - w, g)).sum(1) for g in range(WIDTH // group)]
    np.testing.assert_allclose(found, np.min(losses, axis=0), rtol=1e-3)
    assert np.sum(found) < np.sum(losses[0])


@pytest.mark.parametrize("fold", [PLAIN, HEADS], ids=["norm", "heads"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_smoothquant_scale(fold, strength):
    """Equation 4 of arXiv:2211.10438, over all that reads a channel."""
    layer = {f"{name}.weight": array(w) for name, w in zip(fold.products, WEIGHTS, strict=False)}
    read = np.max([np.abs(w).max(0) for _, w in zip(fold.products, WEIGHTS, strict=False)], axis=0)
    per_channel = lambda values: values.reshape(fold.repeats).max(1).reshape(-1)
    x, w = per_channel(np.abs(X).max(0)), per_channel(read)
    ours = SmoothQuant(strength=strength).scale(fold, layer, array(np.abs(X).max(0)))
    np.testing.assert_allclose(ours, x**strength / w ** (1 - strength), rtol=1e-5)


def test_a_channel_never_seen_keeps_its_scale():
    silent = array(np.where(np.arange(WIDTH) == 5, 0, np.abs(X).max(0)))
    layer = {f"{name}.weight": array(w) for name, w in zip(PLAIN.products, WEIGHTS, strict=True)}
    assert float(SmoothQuant().scale(PLAIN, layer, silent)[5]) == 1
    found = Statistics.of(array(X * (np.asarray(silent) > 0)), gram=True)
    form = quantization_format("int4_g32_zero")
    scale = awq_scale([array(w) for w in WEIGHTS], found.mean_abs, found.gram, fold=PLAIN, format=form)
    assert np.isfinite(scale).all() and (np.asarray(scale) > 0).all()


@pytest.mark.parametrize(
    "method", [AWQ(format="int4_g32_zero"), SmoothQuant()], ids=lambda m: type(m).__name__
)
def test_a_walk_rounds_every_product(rich, ids, method):
    rounded = walk(rich, ids, [method])
    for name, value in weights(rounded).items():
        inside = name.startswith("layers.") and name.endswith("weight") and "norm" not in name
        assert isinstance(value, QArray) == inside, name


def test_scales_alone_change_nothing(rich, ids):
    scaled = walk(rich, ids, [AWQ(format="int4_g32_zero", round=False)])
    before = rich(ids)
    np.testing.assert_allclose(scaled(ids), before, atol=1e-4 * float(jnp.abs(before).max()))
    assert not np.allclose(
        weights(scaled)["layers.0.mlp_norm.weight"], weights(rich)["layers.0.mlp_norm.weight"]
    )


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"strength=1\.5 must lie between 0 and 1"):
        SmoothQuant(strength=1.5)
    for method in (AWQ, SmoothQuant):
        with pytest.raises(ValueError, match="unknown quantization 'int5'"):
            method(format="int5")
