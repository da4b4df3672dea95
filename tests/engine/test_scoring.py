"""What the engine says of a prompt is what the forward says of it; NaN stays where it arose."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import weights, with_weights
from tests.engine import oracle

SIZES = EngineConfig(max_slots=4, max_seq_len=oracle.LENGTH, max_tokens_per_step=32, decode_steps=4)
POISON = 5  # a token whose embedding is NaN
PROMPTS = oracle.prompts(90, 80, 1, 40, 2, 33)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    return Engine(oracle.wide(), None, SIZES)


def check_scores(scores):
    for prompt, score in zip(PROMPTS, scores, strict=True):
        rows = oracle.logprobs(oracle.wide(), prompt)[: len(prompt) - 1]
        expected = rows[np.arange(len(rows)), prompt[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        sure = np.diff(np.sort(rows)[:, -2:])[:, 0] > oracle.TIE
        np.testing.assert_array_equal(score.greedy[sure], (rows.argmax(-1) == prompt[1:])[sure])


def test_scores(engine):
    check_scores(engine.score(PROMPTS))


def test_scores_beside_others_and_from_the_start_again(engine):
    """Those that came first take the pages of a prompt that is half scored."""
    few = Engine(oracle.wide(), None, dataclasses.replace(SIZES, cache_tokens=oracle.LENGTH + 16))
    streams = [few.submit(p[:14], dataclasses.replace(SHORT, max_tokens=60)) for p in PROMPTS[:3:2]]
    check_scores(few.score(PROMPTS))
    assert few.metrics().preemptions > 0
    assert all(len(stream.result().token_ids) == 60 for stream in streams)


def test_embeddings(engine):
    """Also of a prompt whose pages are there already."""
    for _ in range(2):
        expected = [oracle.hidden(oracle.wide(), prompt).mean(0) for prompt in PROMPTS]
        np.testing.assert_allclose(engine.embed(PROMPTS), expected, atol=1e-4)


def test_a_single_token_and_a_full_context(engine):
    (score,) = engine.score([[7]])
    assert score.logprobs.shape == score.greedy.shape == (0,)
    (whole,) = oracle.prompts(90, oracle.LENGTH)
    (score,) = engine.score([whole])
    assert score.logprobs.shape == (oracle.LENGTH - 1,)
    with pytest.raises(ValueError, match="the prompt has 97 tokens and the context is 96"):
        engine.score([[*whole, 1]])


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (lambda tokens: 1 / 0, "the function of allowed tokens failed: division by zero"),
        (lambda tokens: np.ones(3, bool), r"it gave bool\[3\] and must give bool\[96\]"),
        (lambda tokens: np.zeros(96, bool), "it allows no token"),
        (lambda tokens: np.ones(96, bool) if len(tokens) < 3 else [], "must give bool"),
    ],
)
def test_a_mask_that_is_of_no_use_fails_its_request_alone(engine, allowed, message):
    beside = engine.submit(PROMPTS[2], SHORT)
    failing = engine.submit(PROMPTS[4], SHORT, allowed=allowed)
    result = failing.result()
    assert result.finish_reason == "error"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.error)
    assert len(result.token_ids) in (0, 3)
    failing.cancel()
    assert failing.result().error == result.error
    assert oracle.check_greedy(oracle.wide(), PROMPTS[2], beside.result().token_ids) > 4


def test_an_engine_cannot_be_used_by_what_it_calls(engine):
    inner = lambda tokens: engine.score(PROMPTS[:1])
    result = engine.submit(PROMPTS[4], SHORT, allowed=inner).result()
    assert "cannot be used by what it calls" in result.error
    assert engine.score(PROMPTS[:1])[0].error is None
    assert engine.metrics().running == engine.metrics().waiting == 0


@pytest.fixture(scope="module", params=[16, 8], ids=["kernel", "jax.numpy"])
def poisoned(request):
    """An engine, on pages of either form, whose model has NaN for one token."""
    model = oracle.wide()
    embedding = weights(model)["embed.weight"].at[POISON].set(jnp.nan)
    model = with_weights(model, {"embed.weight": embedding})
    return model, Engine(model, None, dataclasses.replace(SIZES, page_size=request.param))


def test_nan_fails_the_request_that_has_it(poisoned):
    model, engine = poisoned
    clean = oracle.prompts(90, 30, 12, 45, seed=1)
    clean = [[token + (token == POISON) for token in prompt] for prompt in clean]
    dirty = [*clean[0][:25], POISON]
    later = oracle.prompts(90, 70, seed=9)[0]
    later = [token + (token == POISON) for token in later]
    first, *fine = engine.generate([dirty, *clean], SHORT)
    assert first.finish_reason == "error"
    assert "no numbers" in first.error
    assert first.token_ids == []
    # Once more: what failed left NaN in pages that others now hold, and some began as these begin.
    again, *more = engine.generate([dirty, *clean, later, [*clean[0][:25], 9]], SHORT)
    assert again.error == first.error
    for prompt, result in zip([*clean, *clean, later, [*clean[0][:25], 9]], [*fine, *more], strict=True):
        assert result.error is None
        assert oracle.check_greedy(model, prompt, result.token_ids) > 0
    first, failed, last = engine.score([clean[0], dirty, clean[2]])
    assert failed.error == again.error
    assert failed.logprobs.shape == failed.greedy.shape == (0,)
    for prompt, score in ((clean[0], first), (clean[2], last)):
        assert score.error is None
        assert score.logprobs.shape == (len(prompt) - 1,)
        assert np.isfinite(score.logprobs).all()
    vectors = engine.embed([dirty, clean[1]])
    assert np.isnan(vectors[0]).all()
    np.testing.assert_allclose(vectors[1], oracle.hidden(model, clean[1]).mean(0), atol=1e-4)


@pytest.mark.parametrize("spoiled", [float("nan"), float("-inf")])
def test_scores_that_a_processor_spoils_fail_the_request(spoiled):
    def late(logits, tokens, positions):
        return jnp.where(positions[:, None] > 25, spoiled, logits)

    engine = Engine(oracle.tiny("llama"), None, SIZES, processors=[late])
    prompts = oracle.prompts(90, 20, 3)
    first, second = engine.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert first.finish_reason == "error" and "after processors" in first.error
    assert len(first.token_ids) == 7, "those fed at positions 19 to 25"
    assert second.finish_reason == "length"


def test_nan_on_the_way(poisoned):
    """A request that is made to say the token fails when it has."""
    _, engine = poisoned
    says = lambda tokens: np.arange(96) == (POISON if len(tokens) == 2 else 7)
    (prompt,) = oracle.prompts(90, 20, seed=4)
    result = engine.submit(prompt, SHORT, allowed=says).result()
    assert (result.token_ids, result.finish_reason) == ([7, 7, POISON], "error")
    (biased,) = engine.generate([prompt], dataclasses.replace(SHORT, logit_bias={POISON: 1e9}))
    assert (biased.token_ids, biased.finish_reason) == ([POISON], "error")
