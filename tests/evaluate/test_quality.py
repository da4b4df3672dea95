"""Perplexity and KL divergence against float64 NumPy on the model's own logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.checkpoints import mesh_sharding
from jaxopt_llm.evaluate import quality
from jaxopt_llm.models import abstract, place, weights, with_weights, without_layers
from jaxopt_llm.sharding import split_over


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def model(stories):
    return stories[0]


@pytest.fixture(scope="module")
def ids(stories, data_dir):
    text = (data_dir / "wikitext.txt").read_text("utf-8")
    return stories[1].encode(text[:2000], add_special=False)


@pytest.fixture(scope="module")
def coarse(model):
    """The same model, its embedding (and so its head) off by a little."""
    noise = 0.02 * jax.random.normal(jax.random.key(0), (512, 64))
    return with_weights(model, {"embed.weight": weights(model)["embed.weight"] + noise})


def log_probs(model, tokens):
    """Of each token after the first, `[T-1, V]`."""
    logits = np.asarray(model(jnp.asarray([tokens])), np.float64)[0, :-1]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def nlls(model, tokens):
    return -log_probs(model, tokens)[np.arange(len(tokens) - 1), tokens[1:]]


def test_perplexity_is_what_its_definition_gives(model, ids):
    windows = [ids[first : first + 64] for first in range(0, 230, 64)]
    windows[-1] = windows[-1][:38]
    found = evaluate.perplexity(model, ids[:230], window=64)
    expected = [nlls(model, window) for window in windows]
    np.testing.assert_allclose(found.window_nll, [nll.mean() for nll in expected], rtol=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.concatenate(expected).mean()), rel=1e-5)
    assert found.tokens == 230 - 4
    assert found.bits_per_byte is None


def test_overlapping_windows_score_with_the_context_they_have(model, ids):
    found = evaluate.perplexity(model, ids[:96], window=64, stride=16)
    expected = [*nlls(model, ids[:64]), *nlls(model, ids[16:80])[-16:], *nlls(model, ids[32:96])[-16:]]
    assert found.tokens == 95
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_bos_is_read_and_not_scored(model, ids):
    found = evaluate.perplexity(model, ids[:32], window=32, bos=1)
    assert found.perplexity == pytest.approx(math.exp(nlls(model, [1, *ids[1:32]]).mean()), rel=1e-5)


def test_bits_per_byte_count_the_bytes_of_what_was_scored(stories, ids):
    model, tokenizer = stories
    found = evaluate.perplexity(model, ids[:128], window=64, tokenizer=tokenizer)
    scored = b"".join(tokenizer.token_bytes(token) for token in ids[1:64] + ids[65:128])
    nats = 126 * math.log(found.perplexity)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(scored), rel=1e-6)


def test_comparison_is_what_its_definition_gives(model, coarse, ids):
    found = evaluate.compare(coarse, model, ids[:128], window=64)
    pairs = [(log_probs(model, ids[i : i + 64]), log_probs(coarse, ids[i : i + 64])) for i in (0, 64)]
    kld = [(np.exp(p) * (p - q)).sum(-1) for p, q in pairs]
    same = [p.argmax(-1) == q.argmax(-1) for p, q in pairs]
    assert found.kld_mean == pytest.approx(np.mean(kld), rel=1e-4)
    np.testing.assert_allclose(found.window_kld, np.mean(kld, axis=1), rtol=1e-4)
    assert found.same_top_p == pytest.approx(np.mean(same))
    assert 0.5 < found.same_top_p < 1
    for part, alone in ((found.reference, model), (found.perplexity, coarse)):
        expected = evaluate.perplexity(alone, ids[:128], window=64)
        assert part.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        assert part.tokens == expected.tokens


def test_a_reference_reads_each_window_once(model, coarse, ids, monkeypatch):
    reference = evaluate.Reference(model)
    first = evaluate.compare(coarse, reference, ids[:128], window=64)
    plain = evaluate.compare(coarse, model, ids[:128], window=64)
    np.testing.assert_array_equal(first.token_kld, plain.token_kld)
    read, hidden = [], quality._hidden
    monkeypatch.setattr(quality, "_hidden", lambda *parts: read.append(parts[-1]) or hidden(*parts))
    second = evaluate.compare(coarse, reference, ids[:190], window=64)
    np.testing.assert_array_equal(second.token_kld[: len(first.token_kld)], first.token_kld)
    assert len(read) == 3 + 1  # the model's three windows, and the reference's new one


def test_a_model_does_not_differ_from_itself(model, ids):
    found = evaluate.compare(model, model, ids[:64], window=64)
    assert (found.kld_mean, found.same_top_p) == (0.0, 1.0)


def test_errors_come_from_how_windows_differ(stories, coarse, ids):
    """Windows of one length: SciPy's formulas for a mean."""
    model, tokenizer = stories
    found = evaluate.compare(coarse, model, ids[:320], window=64, tokenizer=tokenizer)
    own, pairs = found.perplexity, found.token_kld.reshape(5, 63)
    sem = stats.sem(own.window_nll)
    interval = stats.t.interval(0.95, df=4, loc=np.mean(own.window_nll), scale=sem)
    assert own.stderr == pytest.approx(own.perplexity * sem, rel=1e-5)
    assert own.interval == pytest.approx(np.exp(interval), rel=1e-5)
    np.testing.assert_allclose(pairs.mean(1), found.window_kld, rtol=1e-5)
    assert found.kld_stderr == pytest.approx(stats.sem(found.window_kld), rel=1e-5)
    low, high = found.kld_interval
    assert low < found.kld_mean < high
    low, high = found.same_top_interval
    assert 0 <= low < found.same_top_p < high <= 1
    low, high = own.bits_per_byte_interval
    assert low < own.bits_per_byte < high
    alone = evaluate.perplexity(model, ids[:64], window=64, tokenizer=tokenizer)
    assert (alone.stderr, alone.interval, alone.bits_per_byte_interval) == (None, None, None)


def test_chunks_do_not_change_figures(model, coarse, ids, monkeypatch):
    whole = evaluate.compare(coarse, model, ids[:77], window=77)
    monkeypatch.setattr(quality, "_LOGITS", 10 * 512)
    quality._score.clear_cache()
    chunked = evaluate.compare(coarse, model, ids[:77], window=77)
    quality._score.clear_cache()
    assert chunked.kld_mean == pytest.approx(whole.kld_mean, rel=1e-5)
    assert chunked.perplexity.perplexity == pytest.approx(whole.perplexity.perplexity, rel=1e-6)
    assert chunked.same_top_p == whole.same_top_p


def test_no_intermediate_is_larger_than_a_chunk_of_logits(model):
    """Gemma's vocabulary: [T, V] would be sixteen times the limit."""
    wide = abstract(dataclasses.replace(model.config, vocab_size=262_144, max_seq_len=1024))
    graph, params = nnx.split(without_layers(wide))
    tokens = jax.ShapeDtypeStruct((1024,), jnp.int32)
    hidden = jax.ShapeDtypeStruct((1024, wide.config.d_model), jnp.float32)
    score = jax.make_jaxpr(quality._score, static_argnums=0)
    traced = score((graph,) * 2, (params,) * 2, (hidden,) * 2, tokens)
    assert max(intermediates(traced.jaxpr)) == quality._LOGITS


def intermediates(jaxpr):
    """Elements of every result of every operation, within loops too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "sequence=2,tensor=4"])
def test_a_mesh_gives_one_devices_figures(model, ids, mesh):
    placed = place(model, mesh_sharding(mesh, model.config))
    found = evaluate.perplexity(placed, ids[:64], window=64)
    assert found.perplexity == pytest.approx(
        evaluate.perplexity(model, ids[:64], window=64).perplexity, rel=1e-5
    )


def test_a_split_sequence_takes_a_part_of_the_memory(model, ids):
    """Of what lies between its products, on each device."""
    needed = {}
    for mesh in ("data=1", "sequence=4"):
        sharding = mesh_sharding(mesh, model.config)
        graph, params = nnx.split(place(model, sharding))
        where = split_over(sharding.mesh, "sequence")
        tokens = jax.ShapeDtypeStruct((512,), jnp.int32, sharding=where)
        compiled = quality._hidden.lower(graph, params, tokens).compile()
        needed[mesh] = compiled.memory_analysis().temp_size_in_bytes
    assert needed["sequence=4"] < needed["data=1"] / 2


def test_windows_that_a_sequence_axis_does_not_divide(model, ids):
    placed = place(model, mesh_sharding("sequence=4", model.config))
    with pytest.raises(ValueError, match="mesh sequence=4 does not divide window=62"):
        evaluate.perplexity(placed, ids[:64], window=62)


def test_progress_counts_windows(model, ids):
    seen = []
    evaluate.perplexity(model, ids[:150], window=64, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([1, 2], {"window": 1024}, "window=1024 is longer than the model's context of 512; try window=512"),
        ([1, 512], {"window": 4}, "token id 512 lies outside the vocabulary of 512"),
        ([1, -1], {"window": 4}, "token id -1 lies outside"),
        ([1, 2], {"window": 4, "bos": 600}, "token id 600 lies outside"),
        ([1], {"window": 4}, "the text has 1 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(model, tokens, settings, message):
    with pytest.raises(ValueError) as caught:
        evaluate.perplexity(model, tokens, **settings)
    assert message in str(caught.value)


def test_models_of_two_vocabularies_are_not_compared(model):
    other = abstract(dataclasses.replace(model.config, vocab_size=100))
    with pytest.raises(ValueError, match="vocabulary of 512 tokens and the reference one of 100"):
        evaluate.compare(model, other, [1, 2], window=4)
