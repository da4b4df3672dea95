"""The generator on a real, tiny model: what a batch gives is what each prompt gives alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Generator, SamplingParams

LILY = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def generator(stories):
    return Generator(*stories)


def greedy(generator, prompts, **settings):
    return generator.generate(prompts, SamplingParams(**{"max_tokens": 24} | settings))


def test_greedy_text_is_the_models_own(generator):
    """As llama2.c's documentation prints it."""
    (result,) = greedy(generator, [[1]], max_tokens=60)
    assert result.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )
    assert result.prompt_tokens == 1
    assert len(result.token_ids) == 60
    assert result.finish_reason == "length"
    assert result.ttft_ms > 0
    assert result.tpot_ms > 0


def test_a_batch_gives_what_each_gives_alone(generator):
    prompts = [LILY, "The dog", [1, 403], LILY + " She had a red ball", "x"]
    ask = [(5, 0), (24, 0.8), (9, 0), (24, 1.2), (1, 0)]
    params = [SamplingParams(max_tokens=n, temperature=t, seed=7) for n, t in ask]
    together = generator.generate(prompts, params)
    for prompt, settings, batched in zip(prompts, params, together, strict=True):
        (alone,) = generator.generate([prompt], settings)
        assert alone.token_ids == batched.token_ids
        assert alone.text == batched.text
        assert len(alone.token_ids) == settings.max_tokens


def test_more_prompts_than_slots(generator):
    results = greedy(generator, [LILY] * 35, max_tokens=3)
    assert len({tuple(r.token_ids) for r in results}) == 1
    assert len(results) == 35


def test_stream_joins_to_the_result(generator):
    params = SamplingParams(max_tokens=30)
    *chunks, last = generator.stream(LILY, params)
    assert last.result == generator_result(generator, params, last.result)
    assert "".join(chunk.text for chunk in [*chunks, last]) == last.result.text
    assert len(chunks) >= 2


def generator_result(generator, params, like):
    """The same request once more, with the times of `like`."""
    (again,) = generator.generate([LILY], params)
    return type(again)(**vars(again) | {"ttft_ms": like.ttft_ms, "tpot_ms": like.tpot_ms})


def test_stop_string_ends_the_text_before_it(generator):
    (whole,) = greedy(generator, [LILY], max_tokens=40)
    stop = whole.text[20:26]
    (cut,) = greedy(generator, [LILY], max_tokens=40, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_end_of_sequence_token_stops(stories, generator):
    """A processor that wants the end makes one; `ignore_eos` goes on past it."""
    ends = lambda logits, tokens, positions: logits.at[:, 2].add(jnp.where(positions >= 20, 100.0, 0.0))
    finishing = Generator(*stories, processors=[ends])
    (result,) = greedy(finishing, [LILY], max_tokens=30)
    assert result.token_ids[-1] == 2
    assert result.finish_reason == "stop"
    assert "</s>" not in result.text
    (longer,) = greedy(finishing, [LILY], max_tokens=30, ignore_eos=True)
    assert len(longer.token_ids) == 30
    assert longer.finish_reason == "length"


def test_logprobs_are_the_models(stories, generator):
    model, tokenizer = stories
    (result,) = greedy(generator, [LILY], max_tokens=6, logprobs=3)
    ids = tokenizer.encode(LILY) + result.token_ids
    values = jax.nn.log_softmax(model(jnp.asarray([ids]))[0], axis=-1)[-7:-1]
    for entry, row, token in zip(result.logprobs, values, result.token_ids, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [i for i, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], row[best], atol=1e-4)
    assert greedy(generator, [LILY], logprobs=0)[0].logprobs[0].top == ()
    assert greedy(generator, [LILY])[0].logprobs is None


def test_penalties_forbid_repetition(generator):
    (result,) = greedy(generator, [LILY], max_tokens=30, frequency_penalty=100.0)
    assert len(set(result.token_ids)) == 30


def test_seeds(generator):
    draw = lambda seed: greedy(generator, [LILY], temperature=1.5, seed=seed)[0].token_ids
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_context_is_the_end(stories):
    model, _ = stories
    ids = np.random.default_rng(0).integers(3, 500, 509).tolist()
    (result,) = jo.generate(model, None, [ids], max_tokens=50, ignore_eos=True)
    assert len(result.token_ids) == 3
    assert result.text == ""


def test_weights_may_be_quantized(stories):
    model, tokenizer = stories
    (result,) = jo.generate(jo.quantize(model, "int8"), tokenizer, [LILY], max_tokens=10)
    assert result.text.startswith(" She loved to play")


def test_bad_calls(stories, generator):
    model, _ = stories
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        generator.generate([LILY], [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="need a tokenizer"):
        jo.generate(model, None, ["text"])
    with pytest.raises(ValueError, match="not both"):
        jo.generate(model, None, [[1]], SamplingParams(), max_tokens=3)
    with pytest.raises(ValueError, match=r"logits processor <lambda> gives .*; it must give"):
        Generator(model, processors=[lambda logits, tokens, positions: logits[:, :3]])
    with pytest.raises(ValueError, match=r"logits processor <lambda> fails"):
        Generator(model, processors=[lambda logits: logits])
    with pytest.raises(ValueError, match=r"logits processor <lambda> gives None; it must give"):
        Generator(model, processors=[lambda logits, tokens, positions: None])
