"""`config.json` files: what they may not say, by the key that says it."""

import math

import pytest

from jaxopt_llm.models.families import parse_config
from tests import families


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "rms_norm_eps", "1e-5"),
        ("llama", "rms_norm_eps", math.nan),
        ("llama", "rope_theta", 0),
        ("llama", "rope_theta", "1e4"),
        ("llama", "rope_theta", 10**400),
        ("llama", "rope_scaling", [1]),
        ("llama", "rope_parameters", "x"),
        ("llama", "tie_word_embeddings", "false"),
        ("llama", "attention_bias", 1),
        ("llama", "num_hidden_layers", 2**31 - 1),
        ("llama", "eos_token_id", "abc"),
        ("llama", "eos_token_id", [1.5]),
        ("llama", "bos_token_id", 2**31),
        ("mistral", "sliding_window", 0),
        ("mistral", "sliding_window", -4),
        ("mistral", "sliding_window", "4096"),
        ("qwen2_window", "max_window_layers", "1"),
        ("qwen2_window", "layer_types", "full_attention"),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma2", "attn_logit_softcapping", 0),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma3_text", "rope_local_base_freq", [1e4]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", {"1": 1}),
        ("gpt_oss", "quantization_config", "mxfp4"),
    ],
)
def test_a_key_of_nonsense_is_named(name, key, value):
    with pytest.raises(ValueError, match=rf"config.json has {key}=.* was expected"):
        parse_config(families.TINY[name] | {key: value})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": []}, r"activation \[\]; known are"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, r"no code reads for 'default': \['factor'\]"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' without a factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be more than 0"),
        ("llama", {"rope_scaling": {"type": [], "factor": 2}}, r"rope_type '\[\]'; known are"),
        ("llama", {"rope_parameters": {"rope_theta": 1}}, "theta=1.0 must be more than 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "per_token=9 experts must not be more than count=8"),
        ("gemma2", {"layer_types": [[]] * 4}, r"layer_types \[\[\], \[\], \[\], \[\]\]"),
    ],
)
def test_nonsense_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(families.TINY[name] | changes)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_layers_that_transformers_takes_for_alike(name):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    settings = {"use_sliding_window": True} if name == "qwen3_moe" else {}
    changes = settings | {"sliding_window": 8, "layer_types": types}
    with pytest.raises(ValueError, match=f"layer_types of several kinds; all layers of {name} are alike"):
        parse_config(families.TINY[name] | changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [("bogus", 1), ("quantization_config", {"quant_method": "gptq"}), ("rope_scaling", {"factor": 2})],
)
def test_every_key_of_a_multimodal_wrapper_is_accounted_for(key, value):
    with pytest.raises(ValueError, match=f"no code reads for model_type 'gemma3': {key}="):
        parse_config(families.GEMMA3 | {key: value})


def test_a_multimodal_wrapper_decides_over_its_text_model():
    said = {"tie_word_embeddings": False, "pad_token_id": 7, "bos_token_id": None}
    config = parse_config(families.GEMMA3 | said)
    assert (config.tied, config.pad_id, config.bos_id, config.eos_ids) == (False, 7, 2, (1, 106))
    assert parse_config(families.GEMMA3).tied
    text = families.GEMMA3["text_config"] | {"tie_word_embeddings": False}
    assert not parse_config(families.GEMMA3 | {"text_config": text}).tied


def test_minus_one_is_no_token():
    """As LLaMA's first conversions write it."""
    config = parse_config(families.LLAMA | {"pad_token_id": -1, "eos_token_id": [2, -1]})
    assert (config.pad_id, config.eos_ids) == (None, (2,))


def test_a_default_rope_may_have_a_factor_of_one():
    same = {"rope_scaling": {"rope_type": "default", "factor": 1.0}}
    assert parse_config(families.LLAMA | same) == parse_config(families.LLAMA)
