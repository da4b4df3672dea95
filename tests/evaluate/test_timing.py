"""Speed: arithmetic on times that are known, and lengths that make sense."""

import pytest

import jaxopt_llm as jo
from jaxopt_llm import evaluate
from jaxopt_llm.engine import Engine, Result


@pytest.fixture(scope="module")
def model(data_dir):
    return jo.load(data_dir / "stories260K.gguf")[0]


def test_medians_of_what_the_engine_tells(model, monkeypatch):
    times = iter([(40.0, 5.0), (20.0, 8.0), (10.0, 4.0)])  # ms: time to first token, per later token
    asked = []

    def generate(self, prompts, params):
        asked.append((len(prompts[0]), params.max_tokens, params.ignore_eos))
        ttft, tpot = next(times)
        return [
            Result(
                text="",
                token_ids=[1, 2],
                finish_reason="length",
                prompt_tokens=8,
                cached_tokens=0,
                logprobs=None,
                error=None,
                ttft_ms=ttft,
                tpot_ms=tpot,
            )
        ]

    monkeypatch.setattr(Engine, "generate", generate)
    found = evaluate.speed(model, prompt_tokens=8, output_tokens=4)
    assert found.prefill_tokens_per_s == pytest.approx(8 / 0.020)
    assert found.decode_tokens_per_s == pytest.approx(1 / 0.005)
    assert asked == [(8, 4, True)] * 3


def test_speed_of_a_real_model(model):
    seen = []
    found = evaluate.speed(
        model, prompt_tokens=500, output_tokens=12, repeats=1, progress=lambda *at: seen.append(at)
    )
    assert found.prefill_tokens_per_s > 0
    assert found.decode_tokens_per_s > 0
    assert seen == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
        ({"output_tokens": 1}, "output_tokens=1 must be at least 2"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"prompt_tokens": 500, "output_tokens": 13}, "more than the model's context of 512"),
    ],
)
def test_lengths_that_cannot_be_timed(model, lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluate.speed(model, **lengths)
