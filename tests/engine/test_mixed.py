"""Requests of every kind in one batch: each as it is alone, and no program beyond those that `warm_up` compiled."""

import dataclasses

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from tests.engine import oracle

SIZES = EngineConfig(max_slots=4, max_seq_len=128, max_tokens_per_step=32, decode_steps=4, cache_tokens=384)
LILY = "Once upon a time, there was a little girl named Lily."
PLAIN = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def engine(data_dir):
    """Compiles each of its programs once."""
    engine = Engine(*jo.load(data_dir / "stories107K.gguf"), SIZES)
    with oracle.compilations() as seen:
        assert engine.warm_up() == 4  # 32 tokens with prompts in them; 1, 2 and 4 rows that decode
        assert engine.warm_up(full=True) == 4
    assert seen.count("step") == engine.metrics().programs == 8, "traced once each"
    return engine


def even_digits(tokens):
    """Changes with every token."""
    return np.arange(512) % 10 == 2 * (len(tokens) % 5)


ASKED = [
    (LILY, PLAIN, {}),
    ("The dog", PLAIN, {"allowed": even_digits}),
    (LILY * 2, dataclasses.replace(PLAIN, temperature=0.9, seed=1, top_k=20), {"priority": 2}),
    ("One day", dataclasses.replace(PLAIN, temperature=1.3, seed=1), {"priority": -1}),
    ("One day", dataclasses.replace(PLAIN, temperature=1.3, seed=2, top_p=0.7, min_p=0.02), {}),
    (LILY, dataclasses.replace(PLAIN, max_tokens=40, stop=("to play",), logprobs=4), {}),
    ("x", dataclasses.replace(PLAIN, max_tokens=24, repetition_penalty=1.5, presence_penalty=0.5), {}),
    ("Tom", dataclasses.replace(PLAIN, temperature=0.7, seed=3, frequency_penalty=0.8, logprobs=0), {}),
    ("Tom", dataclasses.replace(PLAIN, logit_bias={403: 50.0, 7: -3.0}), {}),
    (LILY * 3, dataclasses.replace(PLAIN, max_tokens=1, ignore_eos=True), {}),
    ("The dog", dataclasses.replace(PLAIN, temperature=0.8, seed=5), {"allowed": even_digits}),
]


def told(result):
    """What must not depend on neighbours, log-probabilities but for the last digits."""
    logprobs = [(p.token_id, round(p.logprob, 3), len(p.top)) for p in result.logprobs or ()]
    return result.token_ids, result.text, result.finish_reason, result.error, logprobs


def test_each_as_it_is_alone(engine):
    ask = lambda one: engine.submit(one[0], one[1], **one[2])
    streams = [ask(one) for one in ASKED]
    together = [stream.result() for stream in streams]
    alone = [ask(one).result() for one in ASKED]
    assert list(map(told, together)) == list(map(told, alone))
    assert together[5].finish_reason == "stop"
    assert all(token % 2 == 0 for i in (1, 10) for token in together[i].token_ids)
    assert set(together[8].token_ids) == {403}
    assert len(set(together[6].token_ids)) > 12
    assert together[3].token_ids != together[4].token_ids


def test_nothing_compiles_after_warm_up(engine):
    fresh = [(prompt + " and", params, rest) for prompt, params, rest in ASKED]
    with oracle.compilations() as seen:
        streams = [engine.submit(prompt, params, **rest) for prompt, params, rest in fresh]
        engine.generate([LILY] * 3, PLAIN)
        engine.score([LILY, LILY * 4])
        engine.embed(["The cat", LILY * 4])
        streams.pop().cancel()
        assert all(stream.result().error is None for stream in streams)
        assert engine.metrics().running == 0
    assert seen == []
    assert engine.metrics().programs == 8


def test_the_first_in_line_is_the_most_important(engine):
    """With all slots taken, a later request of a lower number starts before an earlier one."""
    running = [engine.submit(LILY, SamplingParams(max_tokens=8)) for _ in range(4)]
    late = engine.submit("The dog", SamplingParams(max_tokens=20))
    first = engine.submit("The cat", SamplingParams(max_tokens=20), priority=-1)
    next(iter(late))
    assert len(first.result().token_ids) == 20
    assert late.result().ttft_ms > first.result().ttft_ms
    assert all(stream.result().finish_reason == "length" for stream in running)


def test_bad_biases_and_prompts_leave_nothing_behind(engine):
    with pytest.raises(ValueError, match="logit_bias names token 512, outside the vocabulary of 512"):
        engine.generate(["a", "b"], [PLAIN, SamplingParams(logit_bias={512: 1.0})])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.generate([[1], [512]])
    assert engine.metrics().waiting == engine.metrics().running == 0
    assert engine.generate([]) == engine.score([]) == []
    assert engine.embed([]).shape == (0, 64)
