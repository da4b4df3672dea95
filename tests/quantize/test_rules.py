"""Rules: which matrix gets which format."""

import jax.numpy as jnp
import pytest

import jaxopt_llm as jo
from jaxopt_llm import configs
from jaxopt_llm.kernels import FORMATS, QArray, quantization_format
from jaxopt_llm.models import abstract, bits_per_parameter, num_bytes, num_params, weights
from jaxopt_llm.optimize import Quantize
from jaxopt_llm.quantize import assign, exact_rules
from tests.engine import oracle


@pytest.fixture(scope="module")
def model():
    """Two layers, widths of 64 and 128, embedding and head apart."""
    return oracle.wide()


MATRICES = {f"attention.{part}" for part in "qkvo"} | {"mlp.gate", "mlp.up", "mlp.down"}
NAMES = {f"layers.{i}.{matrix}.weight" for i in (0, 1) for matrix in MATRICES} | {
    "embed.weight",
    "head.weight",
}


def test_the_first_match_wins_and_the_format_is_for_the_rest(model):
    rules = [("head|embed", "int8"), (r"layers\.0\..*(q|k)\b", None), ("layers.0", "int3_g32_zero")]
    assigned = assign(model, "int4_g64_min", rules)
    floats = {"layers.0.attention.q.weight", "layers.0.attention.k.weight"}
    assert assigned.keys() == NAMES - floats
    assert assigned["head.weight"] == assigned["embed.weight"] == FORMATS["int8"]
    assert assigned["layers.0.mlp.up.weight"] == quantization_format("int3_g32_zero")
    assert assigned["layers.1.attention.q.weight"] == quantization_format("int4_g64_min")


def test_a_shape_is_enough(model):
    assert assign(abstract(model.config), "int8").keys() == NAMES
    assert assign(model, None, [("mlp.down", "int8")]).keys() == {
        f"layers.{i}.mlp.down.weight" for i in (0, 1)
    }
    assert not assign(model, "float")


def test_weights_are_rounded_as_assigned(model):
    small = jo.quantize(model, "int4_g64_zero", rules=[("embed|head", "int8"), ("down", "float")])
    for name, value in weights(small).items():
        if name not in NAMES or "down" in name:
            assert value is weights(model)[name]
        else:
            assert isinstance(value, QArray)
            assert value.bits == (8 if name in ("embed.weight", "head.weight") else 4)
    assert bits_per_parameter(small) == 8 * num_bytes(small) / num_params(model)
    assert 4.5 < bits_per_parameter(jo.quantize(model, "int4_g64_zero")) < 4.7, "norms are float32"


def test_rules_for_each_weight_alone(model):
    own = {"layers.1.mlp.up.weight": "int3_g32", "layers.0.mlp.up.weight": "fp8"}
    assigned = assign(model, None, exact_rules(own))
    assert assigned == {name: quantization_format(format) for name, format in own.items()}


def test_predictions_of_a_mixed_model_are_those_of_its_values(model):
    small = jo.quantize(
        model, "int4_g64_zero", rules=[("embed|head", "fp8"), ("attention.o", "int3_g32_min")]
    )
    floats = {n: v.dequantize() if isinstance(v, QArray) else v for n, v in weights(small).items()}
    tokens = jnp.arange(24)[None]
    exact = jo.from_params(model.config, floats)(tokens)
    assert float(jnp.abs(small(tokens) - exact).max()) < 1e-4 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("format", "rules", "message"),
    [
        ("int8", [("hed", "int8")], "rule 'hed' decides nothing: .* names are such as "),
        ("int8", [("layers", "int8"), ("mlp", None)], "rule 'mlp' decides nothing"),
        ("int8", [("(", "int8")], r"rule '\(' is no regular expression: missing \)"),
        ("int8", [("mlp", "int9")], "unknown quantization 'int9'"),
        ("int8", [("embed", "int4_g128")], "embed.weight has 64 input features, which groups of 128"),
    ],
)
def test_rules_that_make_no_sense_are_refused(model, format, rules, message):
    with pytest.raises(ValueError, match=message):
        jo.quantize(model, format, rules=rules)


def test_recipes_check_their_rules():
    with pytest.raises(ValueError, match="no regular expression"):
        Quantize(rules=(("[", "int8"),))
    with pytest.raises(ValueError, match="unknown quantization 'int9'"):
        Quantize(rules=(("mlp", "int9"),))


def test_recipes_carry_rules(model):
    step = configs.override(Quantize(rules=(("head|embed", "int8"),)), "rules.0.1=float")
    small = jo.quantize(model, step.format, rules=step.rules)
    assert weights(small)["head.weight"] is weights(model)["head.weight"]
    assert weights(small)["layers.0.mlp.up.weight"].bits == 8
