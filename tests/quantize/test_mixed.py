"""Mixed precision: measured losses against float64, the choice against all choices there are."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import abstract, bits_per_parameter, weights, with_weights
from jaxopt_llm.quantize import GPTQ, allocate, assign, exact_rules, layerwise, mixed, sensitivities
from jaxopt_llm.quantize.sensitivity import _Probe
from tests.engine import oracle

FORMATS = ("int3_g64_zero", "int8_g64")


@pytest.fixture(scope="module")
def model():
    return oracle.wide()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def measured(model, ids, tmp_path_factory):
    """Losses, where they are kept, and what progress was told."""
    path, told = tmp_path_factory.mktemp("mixed") / "losses.json", []
    losses = sensitivities(model, ids, FORMATS, path=path, progress=lambda *parts: told.append(parts))
    return losses, path, told


def kld(model, reference, ids):
    logp, logq = (log_softmax(np.asarray(m(ids), np.float64)) for m in (reference, model))
    return (np.exp(logp) * (logp - logq)).sum(-1).mean()


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_each_loss_is_the_divergence_with_that_matrix_rounded(model, ids, measured):
    losses, _, told = measured
    assert losses.keys() == assign(model, "int8").keys()
    assert told[-1] == (32, 32)
    for name in ("embed.weight", "layers.1.attention.o.weight", "head.weight"):
        rounded = quantization_format("int3_g64_zero").quantize(weights(model)[name]).dequantize()
        expected = kld(with_weights(model, {name: rounded}), model, ids)
        assert losses[name]["int3_g64_zero"] == pytest.approx(expected, rel=1e-3)
        assert losses[name]["int8_g64"] < 0.1 * expected


def test_a_tied_embedding_is_the_head_too(ids):
    tied = oracle.tiny("llama", d_model=64, d_ff=64, head_dim=32, tied=True)
    (loss,) = sensitivities(tied, ids, ["int4_g64"])["embed.weight"].values()
    rounded = quantization_format("int4_g64").quantize(weights(tied)["embed.weight"]).dequantize()
    assert loss == pytest.approx(kld(with_weights(tied, {"embed.weight": rounded}), tied, ids), rel=1e-3)


def test_another_budget_needs_no_new_pass(model, ids, measured, monkeypatch):
    losses, path, _ = measured
    assert json.loads(path.read_text())["losses"] == losses
    monkeypatch.setattr(_Probe, "loss", lambda *_: pytest.fail("measured again"))
    assert sensitivities(model, ids, FORMATS, path=path) == losses
    small = mixed(model, ids, target_bits=5.5, formats=FORMATS, gptq=None, path=path)
    assert 5.2 < bits_per_parameter(small) <= 5.5
    assert {w.bits for w in weights(small).values() if isinstance(w, QArray)} == {3, 8}


def test_products_go_through_gptq_each_in_its_format(model, ids, measured, tmp_path):
    """A budget for one format alone is GPTQ in that format; one between gives each matrix its own."""
    told = []
    options = {"formats": FORMATS, "path": measured[1]}
    sizes = {"int3_g64_zero": 3.7, "int8_g64": 16.0}
    small = {f: weights(mixed(model, ids, target_bits=bits, **options)) for f, bits in sizes.items()}
    for format, found in small.items():
        same(found, weights(layerwise(model, ids, [GPTQ(format=format)], rest=format)))
    between = mixed(
        model, ids, target_bits=5.5, **options, directory=tmp_path, progress=lambda *parts: told.append(parts)
    )
    assert bits_per_parameter(between) <= 5.5
    chosen = allocate(model, measured[0], target_bits=5.5)
    assert {name: w.bits for name, w in weights(between).items() if name in chosen} == {
        name: quantization_format(format).bits for name, format in chosen.items()
    }
    assert told[-1] == (34, 34)


def same(found, expected):
    for name, value in found.items():
        for ours, theirs in zip(jax.tree.leaves(value), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_an_interrupted_pass_goes_on(model, ids, measured, tmp_path, monkeypatch):
    losses, path, _ = measured
    kept = json.loads(path.read_text())
    del kept["losses"]["head.weight"]["int8_g64"]
    (tmp_path / "part.json").write_text(json.dumps(kept))
    measure, seen = _Probe.loss, []
    monkeypatch.setattr(
        _Probe, "loss", lambda self, name, format: seen.append(name) or measure(self, name, format)
    )
    assert sensitivities(model, ids, FORMATS, path=tmp_path / "part.json") == losses
    assert seen == ["head.weight"]


def test_what_was_measured_on_another_text_is_refused(model, ids, measured):
    with pytest.raises(ValueError, match="holds a calibration with another text; "):
        sensitivities(model, ids + 1, FORMATS, path=measured[1])


def test_the_allocation_is_the_best_there_is(model):
    """Of all 3**6, within each budget that some price of a byte leads to."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("gate", "up", "down")]
    formats = ("int3_g64_zero", "int4_g64_zero", "int8_g64")
    losses = {name: dict(zip(formats, np.sort(rng.exponential(size=3))[::-1], strict=True)) for name in names}
    size = math.prod(weights(model)["layers.0.mlp.up.weight"].shape) // 64
    nbytes = {
        f: size * quantization_format(f).quantize(np.zeros((1, 64), np.float32)).nbytes for f in formats
    }
    everything = [dict(zip(names, some, strict=True)) for some in itertools.product(formats, repeat=6)]
    spent = lambda chosen: bits_per_parameter(jo.quantize(model, None, rules=exact_rules(chosen)))
    for price in (3e-5, 1e-4, 3e-4, 1e-3):  # of a byte
        cost = lambda chosen, price=price: sum(losses[n][f] + price * nbytes[f] for n, f in chosen.items())
        best = min(everything, key=cost)
        assert allocate(abstract(model.config), losses, target_bits=spent(best) + 1e-9) == best


def test_a_format_that_is_larger_and_worse_is_never_taken(model):
    losses = {"head.weight": {"int4_g64_zero": 0.1, "int8_g64": 0.2}}
    assert allocate(abstract(model.config), losses, target_bits=64) == {"head.weight": "int4_g64_zero"}


def test_bad_wishes_are_refused(model, ids, measured):
    with pytest.raises(ValueError, match=r"target_bits=3.0 is less than the 3\.\d+ bits that the smallest"):
        allocate(model, measured[0], target_bits=3.0)
    with pytest.raises(ValueError, match="int4 rounds activations too; measure a format of weights alone"):
        sensitivities(model, ids, ["int4"])
    with pytest.raises(
        ValueError, match=r"embed\.weight has 64 input features, which no group of int4_g128 divides"
    ):
        sensitivities(model, ids, ["int4_g128"])
    with pytest.raises(ValueError, match="token id 96 lies outside the vocabulary"):
        sensitivities(model, np.full((1, 4), 96, np.int32), FORMATS)


def test_a_divergence_that_is_no_number_names_the_matrix(model, ids):
    broken = with_weights(model, {"layers.0.mlp.up.weight": jnp.full((128, 64), jnp.nan)})
    with pytest.raises(ValueError, match=r"the KL divergence with embed.weight rounded is nan"):
        sensitivities(broken, ids, ["int8"])
