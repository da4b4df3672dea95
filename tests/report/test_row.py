"""Figures of a model beside a reference: what `evaluate` gives, and what cannot be compared."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.models import from_params, num_bytes, num_params, weights
from jaxopt_llm.report import HISTOGRAM_EDGES, Subject, measure
from jaxopt_llm.report.row import histogram

SIZES = {"window": 64, "windows": 3, "speed": False}


@pytest.fixture(scope="module")
def text(data_dir):
    return (data_dir / "wikitext.txt").read_text("utf-8")[:2000]


@pytest.fixture(scope="module")
def original(data_dir):
    path = data_dir / "stories260K.gguf"
    model, tokenizer = jo.load(path)
    return Subject(name="stories260K", model=model, tokenizer=tokenizer, path=path)


@pytest.fixture(scope="module")
def small(original):
    return Subject(name="int8", model=jo.quantize(original.model, "int8"), tokenizer=original.tokenizer)


def test_the_reference_itself(original, text):
    row = measure(original, text, **SIZES)
    ids = original.tokenizer.encode(text, add_special=False)
    expected = evaluate.perplexity(original.model, ids, window=64, windows=3, tokenizer=original.tokenizer)
    assert (row.perplexity, row.perplexity_interval) == (expected.perplexity, expected.interval)
    assert (row.bits_per_byte, row.bits_per_byte_interval) == (
        expected.bits_per_byte,
        expected.bits_per_byte_interval,
    )
    assert row.file_bytes == original.path.stat().st_size
    assert (row.parameters, row.bytes) == (num_params(original.model), num_bytes(original.model))
    assert row.kld_mean is row.same_top_p is row.kld_histogram is row.layer_errors is None
    assert row.decode_tokens_per_s is None


def test_beside_a_reference(original, small, text):
    seen = []
    row = measure(small, text, reference=original, **SIZES, progress=lambda *at: seen.append(at))
    ids = original.tokenizer.encode(text, add_special=False)
    expected = evaluate.compare(small.model, original.model, ids, window=64, windows=3)
    assert (row.kld_mean, row.kld_interval) == (expected.kld_mean, expected.kld_interval)
    assert (row.same_top_p, row.same_top_interval) == (expected.same_top_p, expected.same_top_interval)
    assert sum(row.kld_histogram) == pytest.approx(1)
    middles = np.sqrt(HISTOGRAM_EDGES[1:] * HISTOGRAM_EDGES[:-1])
    assert row.kld_mean == pytest.approx(np.dot(row.kld_histogram, middles), rel=0.2)
    assert len(row.layer_errors) == original.model.config.num_layers
    assert all(0 < error < 0.1 for error in row.layer_errors)
    assert seen == [("scoring int8", done, 3) for done in (1, 2, 3)]


def test_decoding_is_timed(original, text, monkeypatch):
    rate = evaluate.Spread(median=2.0, low=1.0, high=9.0)
    timed = lambda model, progress: types.SimpleNamespace(decode_tokens_per_s=rate)
    monkeypatch.setattr(evaluate, "speed", timed)
    assert measure(original, text, **SIZES | {"speed": True}).decode_tokens_per_s == 2.0


def test_a_histogram_counts_all():
    found = histogram(np.array([0.0, 1e-9, 0.9, 1.1, 1e9]))
    assert (found[0], found[-1]) == (0.4, 0.2)
    assert sum(found) == pytest.approx(1)


def test_models_that_cannot_be_compared(original, text):
    """Another vocabulary: a row more of the embedding."""
    config = original.model.config
    wide = Subject(
        name="wide",
        model=widened(original.model, config.vocab_size + 1),
        tokenizer=original.tokenizer,
    )
    row = measure(wide, text, reference=original, **SIZES)
    assert row.kld_mean is row.layer_errors is None
    assert row.bits_per_byte > 0


def widened(model, vocab_size):
    values = dict(weights(model))
    values["embed.weight"] = jnp.pad(
        values["embed.weight"], ((0, vocab_size - model.config.vocab_size), (0, 0))
    )
    return from_params(dataclasses.replace(model.config, vocab_size=vocab_size), values)


def test_a_bos_that_is_not_there(original, text):
    bare = Subject(name="bare", model=original.model, tokenizer=without_bos(original.tokenizer))
    with pytest.raises(ValueError, match="bare has no BOS token"):
        measure(bare, text, bos=True, **SIZES)


def without_bos(tokenizer):
    return jo.Tokenizer(tokenizer.backend, eos_ids=tokenizer.eos_ids)
