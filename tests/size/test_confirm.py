"""Tier 2: the first candidates, compiled."""

import dataclasses

import pytest

from jaxopt_llm.models import ModelConfig, Rope
from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size import confirm, sweep, traffic
from jaxopt_llm.size.candidate import engine_of
from tests.size.configs import llama

CONFIG = ModelConfig(
    family="llama", vocab_size=256, d_model=64, d_ff=128, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32,
    max_seq_len=512, windows=(None,), rope=Rope(),
)  # fmt: skip
ASKED = traffic(prompt=(32, 32), output=(8, 8), concurrency=2, requests=4)
HERE = dataclasses.replace(CHIPS["t4"], name="this", links=0, link_bandwidth=0.0)


@pytest.fixture
def unmeasured(monkeypatch):
    def here(dtype):
        raise AssertionError("the machine is measured again")

    monkeypatch.setattr("jaxopt_llm.evaluate.roofline.Machine.here", here)


def test_the_machine_at_hand_is_compiled_for_with_the_figures_it_has(unmeasured):
    (found,) = confirm(sweep(CONFIG, ASKED, chips=[HERE]), CONFIG, ASKED, chips=[HERE])
    assert found.compiled is not None
    assert found.fits
    assert found.compiled.decode.weights == pytest.approx(found.bytes_per_chip.weights, rel=0.05)


def test_what_a_small_memory_does_not_hold(unmeasured):
    weights = sweep(CONFIG, ASKED, chips=[HERE])[0].bytes_per_chip.weights
    small = dataclasses.replace(HERE, hbm_bytes=weights + 2**18)
    (found,) = confirm(sweep(CONFIG, ASKED, chips=[small]), CONFIG, ASKED, chips=[small])
    assert not found.fits
    assert "a step needs" in found.compiled.refusal


def test_the_engine_has_room_for_the_mean_of_all_and_for_the_longest():
    long = traffic(prompt=(1000, 3000), output=(100, 100), concurrency=16, requests=200)
    engine = engine_of(llama(), long, slots=16, kv="int8")
    assert (engine.max_slots, engine.cache_dtype) == (16, "int8")
    assert engine.max_seq_len == 3200 == engine_of(llama(), long, slots=1).cache_tokens
    assert 16 * 1900 < engine.cache_tokens < 16 * 2400
    assert engine_of(llama(max_seq_len=3150), long, slots=1).max_seq_len == 3150
