"""A `ModelConfig` cannot hold nonsense, wherever it comes from."""

import dataclasses
import math

import pytest

from jaxopt_llm.models import Experts, ModelConfig, Rope
from jaxopt_llm.models.families import parse_config
from tests import families

CONFIG = parse_config(families.GEMMA3_TEXT)


@pytest.mark.parametrize("name", families.TINY)
def test_json_gives_the_config_back(name):
    config = parse_config(families.TINY[name])
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 0, "d_model=0 must be more than 0"),
        ("d_model", 2**31, "d_model=2147483648 must be of type int"),
        ("d_model", True, "d_model=True must be of type int"),
        ("d_model", 48.0, "d_model=48.0 must be of type int"),
        ("max_seq_len", -1, "max_seq_len=-1 must be more than 0"),
        ("norm_eps", "1e-5", "norm_eps='1e-5' must be of type float"),
        ("norm_eps", math.nan, "norm_eps=nan must be of type float"),
        ("norm_eps", 10**400, "must be of type float"),
        ("norm_eps", 0, "norm_eps=0 must be more than 0"),
        ("query_scale", -1.0, "query_scale=-1.0 must be more than 0"),
        ("logit_softcap", 0.0, "logit_softcap=0.0 must be more than 0"),
        ("tied", "false", "tied='false' must be of type bool"),
        ("tied", 1, "tied=1 must be of type bool"),
        ("activation", "relu", "activation='relu' must be of type"),
        ("qk_norm", [], r"qk_norm=\[\] must be of type"),
        ("windows", (16,) * 5 + (0,), "must be at least 1, or None"),
        ("windows", (16,) * 5 + ("4096",), "windows=.* must be of type"),
        ("windows", (16,) * 5, "windows has 5 entries for num_layers=6"),
        ("rope", None, "rope=None must be of type"),
        ("experts", {}, "experts={} must be of type"),
        ("eos_ids", (1, -1), "must not be negative"),
        ("pad_id", 2**40, "pad_id=1099511627776 must be of type"),
        ("head_dim", 15, "head_dim=15 must be even"),
        ("num_kv_heads", 3, "num_kv_heads=3 must divide num_heads=4"),
    ],
)
def test_nonsense_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta": 1}, "theta=1 must be more than 1"),
        ({"theta": math.inf}, "theta=inf must be of type float"),
        ({"kind": "dynamic"}, "kind='dynamic' must be of type"),
        ({"kind": "linear", "factor": 0}, "factor=0 must be more than 0"),
        ({"kind": "yarn", "factor": 2.0}, "rope kind 'yarn' needs original_max_seq_len"),
        (
            {"kind": "llama3", "original_max_seq_len": 8, "low_freq_factor": 4.0},
            "must be less than high_freq",
        ),
        ({"truncate": 1}, "truncate=1 must be of type bool"),
        ({"beta_slow": 0}, "beta_slow=0 must be more than 0"),
        ({"mscale": -1}, "mscale=-1, mscale_all_dim=None must not be negative"),
    ],
)
def test_ropes_of_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        Rope(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_token": 9}, "per_token=9 experts must not be more than count=8"),
        ({"count": 0}, "count=0 must be more than 0"),
        ({"layers": (1, 0)}, r"layers=\(1, 0\) must be of type"),
    ],
)
def test_experts_of_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"count": 8, "per_token": 2, "d_ff": 4, "layers": (True,)} | settings)
