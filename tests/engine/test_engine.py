"""The engine on a real, tiny model: what a batch gives is what each prompt gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.engine.step import step
from jaxopt_llm.models import weights
from tests.engine import oracle

LILY = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def engine(stories):
    return Engine(*stories)


def greedy(engine, prompts, **settings):
    return engine.generate(prompts, SamplingParams(**{"max_tokens": 24} | settings))


def test_greedy_text_is_the_models_own(engine):
    """As llama2.c's documentation prints it."""
    (result,) = greedy(engine, [[1]], max_tokens=60)
    assert result.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )
    assert result.prompt_tokens == 1
    assert len(result.token_ids) == 60
    assert result.finish_reason == "length"
    assert result.ttft_ms > 0
    assert result.tpot_ms > 0


def test_a_batch_gives_what_each_gives_alone(engine):
    prompts = [LILY, "The dog", [1, 403], LILY + " She had a red ball", "x"]
    ask = [(5, 0), (24, 0.8), (9, 0), (24, 1.2), (1, 0)]
    params = [SamplingParams(max_tokens=n, temperature=t, seed=7) for n, t in ask]
    together = engine.generate(prompts, params)
    for prompt, settings, batched in zip(prompts, params, together, strict=True):
        (alone,) = engine.generate([prompt], settings)
        assert alone.token_ids == batched.token_ids
        assert alone.text == batched.text
        assert len(alone.token_ids) == settings.max_tokens


def test_more_prompts_than_slots(engine):
    results = greedy(engine, [LILY] * 35, max_tokens=3)
    assert len({tuple(r.token_ids) for r in results}) == 1
    assert len(results) == 35


def test_stream_joins_to_the_result(engine):
    params = SamplingParams(max_tokens=30)
    *chunks, last = engine.submit(LILY, params)
    (again,) = engine.generate([LILY], params)
    assert last.result.token_ids == again.token_ids
    assert last.result.text == again.text
    assert "".join(chunk.text for chunk in [*chunks, last]) == last.result.text
    assert [token for chunk in [*chunks, last] for token in chunk.token_ids] == last.result.token_ids
    assert len(chunks) >= 2


def test_stop_string_ends_the_text_before_it(engine):
    (whole,) = greedy(engine, [LILY], max_tokens=40)
    stop = whole.text[20:26]
    (cut,) = greedy(engine, [LILY], max_tokens=40, stop=(stop,))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_end_of_sequence_token_stops(stories, engine):
    """A processor that wants the end makes one; `ignore_eos` goes on past it."""
    ends = lambda logits, tokens, positions: logits.at[:, 2].add(jnp.where(positions >= 20, 100.0, 0.0))
    finishing = Engine(*stories, processors=[ends])
    (result,) = greedy(finishing, [LILY], max_tokens=30)
    assert result.token_ids[-1] == 2
    assert result.finish_reason == "stop"
    assert "</s>" not in result.text
    (longer,) = greedy(finishing, [LILY], max_tokens=30, ignore_eos=True)
    assert len(longer.token_ids) == 30
    assert longer.finish_reason == "length"


def test_logprobs_are_the_models(stories, engine):
    model, tokenizer = stories
    (result,) = greedy(engine, [LILY], max_tokens=6, logprobs=3)
    ids = tokenizer.encode(LILY) + result.token_ids
    values = jax.nn.log_softmax(model(jnp.asarray([ids]))[0], axis=-1)[-7:-1]
    for entry, row, token in zip(result.logprobs, values, result.token_ids, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [i for i, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], row[best], atol=1e-4)
    assert greedy(engine, [LILY], logprobs=0)[0].logprobs[0].top == ()
    assert greedy(engine, [LILY])[0].logprobs is None


def test_penalties_forbid_repetition(engine):
    (result,) = greedy(engine, [LILY], max_tokens=30, frequency_penalty=100.0)
    assert len(set(result.token_ids)) == 30


def test_seeds(engine):
    draw = lambda seed: greedy(engine, [LILY], temperature=1.5, seed=seed)[0].token_ids
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


def test_bad_calls(stories, engine):
    model, _ = stories
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        engine.generate([LILY], [SamplingParams()] * 2)
    with pytest.raises(ValueError, match="need a tokenizer"):
        jo.generate(model, None, ["text"])
    with pytest.raises(ValueError, match="not both"):
        jo.generate(model, None, [[1]], SamplingParams(), max_tokens=3)
    with pytest.raises(ValueError, match=r"logits processor <lambda> gives .*; it must give"):
        Engine(model, processors=[lambda logits, tokens, positions: logits[:, :3]])
    with pytest.raises(ValueError, match=r"logits processor <lambda> fails"):
        Engine(model, processors=[lambda logits: logits])
    with pytest.raises(ValueError, match=r"logits processor <lambda> gives None; it must give"):
        Engine(model, processors=[lambda logits, tokens, positions: None])
    with pytest.raises(ValueError, match=r"gives .*shape=\(1, 1024\).*; it must give .*shape=\(2, 512\)"):
        Engine(model, processors=[lambda logits, tokens, positions: logits.reshape(1, -1)])


def test_processors_are_traced_at_every_size_before_a_program_is(monkeypatch, unchecked):
    """Nothing is compiled here: what a step gives is traced, and shapes stand for the state."""
    met = set()
    note = lambda logits, tokens, positions: met.add(len(logits)) or logits
    sizes = EngineConfig(max_slots=2, max_seq_len=64, max_tokens_per_step=32, prompt_lookup=True)
    engine = Engine(oracle.tiny("llama"), None, sizes, processors=[note])
    checked = met.copy()
    met.clear()
    traced = lambda *arguments, program: jax.eval_shape(functools.partial(step, program=program), *arguments)
    monkeypatch.setattr("jaxopt_llm.engine.runner.step", traced)
    engine.warm_up()
    assert met == checked == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_consumed_model_is_freed_and_goes_on_in_the_engine(stories, data_dir, quantize):
    model, tokenizer = stories
    own, _ = jo.load(data_dir / "stories260K.gguf", quantize=quantize)
    expected = greedy(Engine(jo.quantize(model, quantize) if quantize else model, tokenizer), [LILY])
    consuming = Engine(own, tokenizer, consume=True)
    assert greedy(consuming, [LILY])[0].token_ids == expected[0].token_ids
    freed = [leaf.is_deleted() for leaf in jax.tree.leaves(weights(own)) if leaf.ndim == 2]
    assert any(freed) == (quantize is not None)  # floats stay where they are


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_from_orbax_take_each_program_once(stories, tmp_path, quantize):
    """Orbax commits what it restores to a device, as a step then does with the state that it gives back."""
    model, _ = stories
    jo.save(jo.quantize(model, quantize) if quantize else model, None, tmp_path / "saved")
    restored, _ = jo.load(tmp_path / "saved")
    engine = Engine(restored, None, EngineConfig(max_slots=2, max_seq_len=64, max_tokens_per_step=32))
    ask = lambda: engine.generate([[1, 403, 407]], SamplingParams(max_tokens=20, logprobs=0))
    with oracle.compilations() as first:
        ask()
    with oracle.compilations() as again:
        ask()
    assert first.count("step") == 2, "a prompt, and one row that decodes"
    assert first.count("jit(step)") == 2 * first.count("step"), "lowered and compiled once each"
    assert again == []
