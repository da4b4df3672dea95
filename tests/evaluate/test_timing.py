"""Speed: arithmetic on times that are known, and lengths that make sense."""

import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.engine import Engine, EngineConfig, Result


@pytest.fixture(scope="module")
def model(data_dir):
    return jo.load(data_dir / "stories260K.gguf")[0]


def result(*token_ms):
    return Result(
        text="",
        token_ids=[1] * len(token_ms),
        finish_reason="length",
        prompt_tokens=8,
        cached_tokens=0,
        logprobs=None,
        error=None,
        ttft_ms=token_ms[0],
        tpot_ms=(token_ms[-1] - token_ms[0]) / (len(token_ms) - 1),
        token_ms=token_ms,
    )


def test_figures_follow_from_the_times_of_tokens(model, monkeypatch):
    runs = iter(
        [
            [result(900.0, 990.0, 999.0), result(900.0, 990.0, 999.0)],  # compiles, and does not count
            [result(10.0, 14.0, 18.0), result(14.0, 18.0, 22.0)],
            [result(10.0, 20.0, 30.0), result(20.0, 30.0, 40.0)],
            [result(10.0, 15.0, 20.0), result(15.1, 20.1, 25.1)],  # each counts from its own call
        ]
    )
    asked = []

    def generate(self, prompts, params):
        asked.append(([len(prompt) for prompt in prompts], params.max_tokens, params.ignore_eos))
        return next(runs)

    monkeypatch.setattr(Engine, "generate", generate)
    found = evaluate.speed(model, prompt_tokens=8, output_tokens=3, concurrency=2)
    assert asked == [([8, 8], 3, True)] * 4
    assert found.prefill_tokens_per_s.median == pytest.approx(2 * 8 / 0.0151)
    # From when both have started to the end of the first: a token of each.
    rates = [2 / 0.004, 2 / 0.010, 2 / 0.005]
    decode = found.decode_tokens_per_s
    assert (decode.low, decode.median, decode.high) == pytest.approx((rates[1], rates[2], rates[0]))
    assert found.tpot_ms.median == pytest.approx(5.0)
    assert found.output_tokens_per_s.median == pytest.approx(6 / 0.0251)


@pytest.mark.parametrize(("trim", "sizes"), [(True, (1, 11, 11)), (False, (4, 64, 256))])
def test_an_engine_is_cut_to_its_requests_or_left_as_it_is(model, monkeypatch, trim, sizes):
    seen = []

    def generate(self, prompts, params):
        seen.append((self.config.max_slots, self.config.max_seq_len, self.config.cache_tokens))
        return [result(10.0, 14.0, 18.0)]

    monkeypatch.setattr(Engine, "generate", generate)
    config = EngineConfig(max_slots=4, max_seq_len=64, cache_tokens=256)
    evaluate.speed(model, prompt_tokens=8, output_tokens=3, repeats=1, config=config, trim=trim)
    assert seen == [sizes] * 2


def test_speed_of_a_real_model(model):
    seen = []
    found = evaluate.speed(
        model, prompt_tokens=500, output_tokens=12, repeats=1, progress=lambda *at: seen.append(at)
    )
    assert found.prefill_tokens_per_s.median > 0
    assert found.decode_tokens_per_s.median > 0
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
        ({"output_tokens": 1}, "output_tokens=1 must be at least 2"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"prompt_tokens": 500, "output_tokens": 13}, "more than the model's context of 512"),
    ],
)
def test_lengths_that_cannot_be_timed(model, lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluate.speed(model, **lengths)
