"""Greedy tokens are the plain forward's, whatever the engine does to be fast and whatever stands beside a request."""

import dataclasses

import numpy as np
import pytest

from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.kernels.cpu import library
from tests.engine import oracle

SIZES = EngineConfig(
    max_slots=4, max_seq_len=oracle.LENGTH, page_size=16, max_tokens_per_step=32, decode_steps=4
)
MODELS = {
    "llama": lambda: oracle.tiny("llama"),  # heads of width 8: pages in jax.numpy
    "gemma3": lambda: oracle.tiny("gemma3_text"),  # windows beside full attention: pages in the kernel
    "mistral": lambda: oracle.tiny("mistral"),  # windows alone
    "int8": lambda: oracle.wide("int8"),
    "int8_block": lambda: oracle.wide("int8_block"),
}
TIES = {"int8_block": oracle.ROUNDED_TIE}
LENGTHS = (7, 40, 1, 23, 61)


def greedy(engine, prompts, tokens=20, **settings):
    return engine.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True, **settings))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, an engine whose prompts go in chunks over many pages, some prompts and how close ties are."""
    model = MODELS[request.param]()
    prompts = oracle.prompts(model.config.vocab_size, *LENGTHS)
    return model, Engine(model, None, SIZES), prompts, TIES.get(request.param, oracle.TIE)


def check(case, prompts, results):
    model, _, _, tie = case
    covered = [
        oracle.check_greedy(model, prompt, result.token_ids, tie=tie)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    assert np.mean(covered) > 8, f"too many ties to say anything: {covered}"


def test_chunks_pages_and_neighbours(case):
    _, engine, prompts, _ = case
    check(case, prompts, greedy(engine, prompts))


def test_found_prefix(case):
    """The second time all full pages of a prompt are there, and those of what came of it."""
    _, engine, _, _ = case
    (prompt,) = oracle.prompts(90, 50, seed=5)
    (first,) = greedy(engine, [prompt])
    (again,) = greedy(engine, [prompt])
    assert (first.cached_tokens, again.cached_tokens) == (0, 48)
    longer = prompt + first.token_ids[:16]
    (on,) = greedy(engine, [longer], tokens=10)
    assert on.cached_tokens == 64
    check(case, [prompt, longer], [again, on])


def other_sizes(name, **changes):
    model = MODELS[name]()
    engine = Engine(model, None, dataclasses.replace(SIZES, **changes))
    prompts = oracle.prompts(90, 30, 30, 44, 17, seed=2)
    results = greedy(engine, prompts, tokens=24)
    check((model, engine, prompts, TIES.get(name, oracle.TIE)), prompts, results)
    return engine, prompts


@pytest.mark.parametrize("name", ["llama", "int8_block"])
def test_preemption(name):
    engine, _ = other_sizes(name, cache_tokens=oracle.LENGTH + 16)
    assert engine.metrics().preemptions > 0


def test_one_step_a_dispatch_and_nothing_shared():
    engine, prompts = other_sizes("gemma3", decode_steps=1, prefix_cache=False)
    assert greedy(engine, prompts[:1], tokens=1)[0].cached_tokens == 0


def test_as_many_slots_as_tokens():
    """A step of prompts may have the shape of one that decodes."""
    model = oracle.tiny("llama")
    engine = Engine(model, None, dataclasses.replace(SIZES, max_slots=8, max_tokens_per_step=8))
    prompts = oracle.prompts(90, 20, 3, 9)
    check((model, engine, prompts, oracle.TIE), prompts, greedy(engine, prompts))


def test_int8_pages():
    """Near the float's, though not the same."""
    model = oracle.wide()
    engine = Engine(model, None, dataclasses.replace(SIZES, cache_dtype="int8"))
    prompts = oracle.prompts(90, *LENGTHS)
    for prompt, score in zip(prompts, engine.score(prompts), strict=True):
        rows = oracle.logprobs(model, prompt)
        expected = rows[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(score.logprobs, expected, atol=0.3)
        assert len(prompt) < 20 or np.abs(score.logprobs - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["int8_block", "int8", "q4_k_m"])
def test_neighbours_change_no_bit(name):
    """Tokens and log-probabilities of a quantized model, whose products run in our kernels."""
    if library.load() is None:
        pytest.skip("without the CPU kernels XLA sums a row as it likes")
    model = oracle.q4_k_m() if name == "q4_k_m" else oracle.wide(name)
    engine = Engine(model, None, dataclasses.replace(SIZES, prefix_cache=False))
    prompts = oracle.prompts(90, *LENGTHS, 12, 33, 5, seed=3)
    together = greedy(engine, prompts, logprobs=3)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = greedy(engine, [prompt], logprobs=3)
        assert alone.token_ids == result.token_ids
        assert alone.logprobs == result.logprobs
