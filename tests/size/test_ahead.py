"""Steps compiled for slices that are not there: what grows with layers, collectives, what is too large."""

import dataclasses

import pytest

from jaxopt_llm.engine import EngineConfig
from jaxopt_llm.models import ModelConfig, Rope
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size import Topology, ahead, compile_ahead
from jaxopt_llm.size.ahead import Collective, collectives
from jaxopt_llm.size.model import Shapes, Share

LAYERS = 6
CONFIG = ModelConfig(
    family="llama", vocab_size=1024, d_model=512, d_ff=1024, num_layers=LAYERS, num_heads=8, num_kv_heads=4,
    head_dim=128, max_seq_len=2048, windows=(None,) * LAYERS, rope=Rope(),
)  # fmt: skip
ENGINE = EngineConfig(max_slots=8, cache_tokens=4096, max_tokens_per_step=128)
PLACE = Topology.parse(CHIPS["v5e"], "2x2")
MESH = MeshSpec(tensor=4)


def of_layers(layers: int, **changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, num_layers=layers, windows=(None,) * layers, **changes)


@pytest.fixture(scope="module")
def grown():
    """From what was compiled of two, three and four layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "_WHOLE", 1)
        return compile_ahead(CONFIG, PLACE, MESH, ENGINE)


def test_layers_follow_from_fewer(grown):
    found = compile_ahead(CONFIG, PLACE, MESH, ENGINE)
    assert (grown.layers, found.layers) == ((2, 3, 4), (LAYERS,))
    for name in ("decode", "prefill"):
        one, other = getattr(grown, name), getattr(found, name)
        assert (one.weights, one.cache, one.collectives) == (other.weights, other.cache, other.collectives)
        assert one.nbytes == pytest.approx(other.nbytes, rel=0.1)
    assert grown.fits
    assert found.fits


def test_bytes_are_those_of_shapes(grown):
    share = Share.of(Shapes.of(CONFIG), MESH, platform="tpu")
    assert grown.decode.weights == pytest.approx(
        share.weight_bytes, rel=0.005
    )  # gains are float32 once packed
    assert grown.decode.cache == pytest.approx(share.context_bytes(ENGINE.cache_tokens), rel=1e-6)
    spare = CHIPS["v5e"].hbm_bytes - grown.prefill.weights - grown.prefill.temporaries
    assert grown.cache_tokens * share.context_bytes(1) == pytest.approx(spare, rel=0.01)


@pytest.mark.parametrize("weights", ["bf16", "int8", "w8a8"])
def test_a_layer_sums_twice(weights):
    """After attention and after the feed-forward part, in bfloat16; once more for the embedding."""
    found = compile_ahead(of_layers(2), PLACE, MESH, ENGINE, weights=weights)
    for program, tokens in ((found.decode, ENGINE.max_slots), (found.prefill, ENGINE.max_tokens_per_step)):
        sums = next(one for one in program.collectives if one.kind == "all-reduce")
        assert sums.count == 2 * 2 + 1
        assert sums.nbytes == sums.count * tokens * CONFIG.d_model * 2


def test_what_is_too_large_is_refused_in_the_compilers_words():
    found = compile_ahead(of_layers(3, d_ff=2**23), PLACE, MESH, ENGINE)
    assert not found.fits
    assert "RESOURCE_EXHAUSTED" in found.refusal
    assert "hbm" in found.refusal.lower()
    assert found.cache_tokens is None


def test_periods_of_layers(monkeypatch):
    assert ahead._counts(CONFIG) == (LAYERS,)
    monkeypatch.setattr(ahead, "_WHOLE", 1)
    gemma = dataclasses.replace(CONFIG, num_layers=26, windows=((512,) * 5 + (None,)) * 4 + (512, 512))
    assert ahead._counts(gemma) == (8, 14, 20)
    assert ahead._counts(CONFIG) == (2, 3, 4)
    assert ahead._counts(dataclasses.replace(CONFIG, windows=(512, None, None) * 2)) == (LAYERS,), (
        "periods too long"
    )


def test_collectives_are_read_from_the_text():
    text = """
  %all-reduce.1 = bf16[16,4096]{1,0:T(8,128)(2,1)} all-reduce(%fusion), replica_groups={}
  %all-gather-start = (f32[8,512]{1,0}, f32[8,4096]{1,0}) all-gather-start(%x), dimensions={1}
  %all-gather-done = f32[8,4096]{1,0} all-gather-done(%all-gather-start)
  %all-reduce-start.2 = f32[4]{0} all-reduce-start(%y)
"""
    assert collectives(text) == (
        Collective("all-gather", 1, 8 * 4096 * 4),
        Collective("all-reduce", 2, 16 * 4096 * 2 + 16),
    )
