"""A packed model computes what its own modules do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.kernels import Packed
from jaxopt_llm.kernels.cpu import library
from jaxopt_llm.kernels.cpu.panels import Panels
from jaxopt_llm.models import FUSIONS, packed
from jaxopt_llm.models.families import parse_config
from tests import families
from tests.engine import oracle

FAMILIES = ("mistral", "qwen3_moe", "mixtral", "gpt_oss")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 90, (2, 24)))


def wide(name):
    """A model whose sizes suit the kernels."""
    experts = parse_config(families.TINY[name]).experts
    changes = (
        {"experts": dataclasses.replace(experts, d_ff=32, layers=(True, True))} if experts else {"d_ff": 128}
    )
    return oracle.tiny(name, d_model=64, head_dim=32, **changes)


@pytest.mark.parametrize("format", [None, "int8", "int8_block", "int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, format):
    model = wide(name) if format is None else jo.quantize(wide(name), format)
    ours = packed(model)
    for layer in ours.layers:
        part = layer.moe if hasattr(layer, "moe") else layer.mlp
        in_panels = [isinstance(p.weight.get_value().parts[0], Panels) for p in (part.gate_up, part.down)]
        assert all(in_panels) == (format is not None and library.load() is not None)
    tie = 0.1 if format in ("int8_block", "int4") else 1e-4  # a rounded activation may fall on its other side
    assert families.relative_error(ours(TOKENS), model(TOKENS)) < tie


@pytest.mark.parametrize(
    "left_out", [{"qkv"}, {"gate_up"}, {"norm"}, FUSIONS], ids=["qkv", "gate_up", "norm", "all"]
)
@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_fusions_give_the_same(name, format, left_out):
    model = wide(name) if format is None else jo.quantize(wide(name), format)
    ours = packed(model, fuse=FUSIONS - left_out)
    assert families.relative_error(ours(TOKENS), model(TOKENS)) < 1e-4


@pytest.mark.skipif(library.load() is None, reason="the library was not built: no C++ compiler")
def test_a_file_of_several_forms_runs_in_kernels_alone():
    model = oracle.q4_k_m()
    ours = packed(model)
    is_packed = lambda leaf: isinstance(leaf, Packed)
    products = [leaf for leaf in jax.tree.leaves(nnx.state(ours), is_leaf=is_packed) if is_packed(leaf)]
    assert len(products) == 4 * len(ours.layers) + 1
    assert all(isinstance(part, Panels) for product in products for part in product.parts)
    assert families.relative_error(ours(TOKENS), model(TOKENS)) < 0.1


def test_unknown_fusions():
    with pytest.raises(ValueError, match="is unknown; known are gate_up, norm, qkv"):
        packed(wide("mistral"), fuse=frozenset({"qvk"}))
