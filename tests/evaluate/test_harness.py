"""The engine as lm-evaluation-harness asks it: against log-likelihoods computed by hand from the model's logits."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig
from jaxopt_llm.evaluate import harness
from tests import harness_tasks

CONTEXT = 64
START = "Once upon a time, there was a little"


@pytest.fixture(scope="module")
def stories(data_dir):
    model, tokenizer = jo.load(data_dir / "stories260K.gguf")
    tokenizer.chat_templates["default"] = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return model, tokenizer


@pytest.fixture(scope="module")
def lm(stories):
    return harness.EngineLM(
        Engine(*stories, EngineConfig(max_slots=1, max_seq_len=CONTEXT, max_tokens_per_step=64))
    )


def requests(*arguments):
    return [Instance("loglikelihood", {}, given, i) for i, given in enumerate(arguments)]


def by_hand(stories, context, continuation):
    return harness_tasks.score(stories[0], context, continuation)


def test_log_likelihood_of_continuations(lm, stories):
    encode = stories[1].encode
    likely, unlikely = lm.loglikelihood(requests((START, " girl"), (START, " seven running")))
    head = encode(START)
    for found, tail in ((likely, " girl"), (unlikely, " seven running")):
        ids = encode(START + tail)
        assert ids[: len(head)] == head
        expected, greedy = by_hand(stories, head, ids[len(head) :])
        assert found[0] == pytest.approx(expected, rel=1e-4)
        assert found[1] == greedy
    assert (likely[1], unlikely[1]) == (True, False)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(lm):
    spaced, usual = lm.loglikelihood(requests((START + " ", "girl"), (START, " girl")))
    assert spaced == usual


def test_after_an_empty_context_stands_the_bos(lm, stories):
    ((found, _),) = lm.loglikelihood(requests(("", START)))
    tokenizer = stories[1]
    ids = tokenizer.encode(START, add_special=False)
    assert found == pytest.approx(by_hand(stories, [tokenizer.bos_id], ids)[0], rel=1e-4)


def test_a_long_context_loses_its_beginning(lm, stories):
    long = START + " girl and a boy" * 20
    with pytest.warns(UserWarning, match="1 of 1 requests are longer than the context of 64"):
        ((found, _),) = lm.loglikelihood(requests((long, " and")))
    ids = stories[1].encode(long + " and")[-CONTEXT:]
    assert found == pytest.approx(by_hand(stories, ids[:-1], ids[-1:])[0], rel=1e-4)
    with pytest.raises(ValueError, match="tokens is to be predicted within a context of 64"):
        lm.loglikelihood(requests((START, long)))


def test_rolling_predicts_every_token_once(lm, stories):
    """By the windows that the harness documents: full ones, the last of them reaching back."""
    text = START + " girl named Lily. She went to the park with her mom." * 8
    (found,) = lm.loglikelihood_rolling(requests((text,)))
    tokenizer = stories[1]
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    size = CONTEXT - 1
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + size, len(ids))
        context = ids[max(0, end - size - 1) : done] if done > 1 else ids[:1]
        total += by_hand(stories, context, ids[done:end])[0]
        done = end
    assert len(ids) > 2 * size
    assert found == pytest.approx(total, rel=1e-4)


def test_generation_ends_before_a_stop_string(lm, stories):
    free, stopped, short = lm.generate_until(
        requests(
            (START, {"until": [], "max_gen_toks": 24}),
            (START, {"until": [".", ""], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}),
            (START, {"until": "\n", "max_gen_toks": 3}),
        )
    )
    model, tokenizer = stories
    head = tokenizer.encode(START)
    ids = harness_tasks.greedy(model, head, 24)
    plain = (tokenizer.to_bytes(head + ids).removeprefix(tokenizer.to_bytes(head))).decode()
    assert free == plain
    assert stopped == plain[: plain.index(".")]
    assert plain.startswith(short) and len(short) < len(stopped)


def test_a_prompt_leaves_room_for_its_answer(lm):
    (text,) = lm.generate_until(requests((START * 20, {"until": [], "max_gen_toks": 16})))
    assert text
    with pytest.raises(ValueError, match="max_tokens=64 leave no room for a prompt in a context of 64"):
        lm.generate_until(requests((START, {"max_gen_toks": 64})))
    assert lm.generate_until(requests(("", {"max_gen_toks": 2})))[0], "begins with the BOS"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs has 'num_beams', which must be one of temperature, top_p"),
        ({"do_sample": True, "temperature": -1.0}, "temperature=-1.0 must be"),
    ],
)
def test_settings_that_the_engine_lacks(lm, settings, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests((START, settings)))


def test_conversations(lm):
    chat = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(chat) == "<user> Hi </s><assistant>"
    begun = [*chat, {"role": "assistant", "content": "The answer is "}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "<user> Hi </s><assistant> The answer is"
    assert lm.chat_template(True) == lm.chat_template("default") != lm.chat_template(False)
    with pytest.raises(ValueError, match="no other chat template"):
        lm.chat_template("other")


def test_answers_reach_the_harness_s_cache(lm, tmp_path, monkeypatch):
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    asked = requests((START, " girl"))
    first = cached.loglikelihood(asked)
    monkeypatch.setattr(lm, "_engine", None)
    assert cached.loglikelihood(asked) == first


def test_an_engine_without_words(stories):
    with pytest.raises(ValueError, match="the engine has no tokenizer"):
        harness.EngineLM(Engine(stories[0], None, EngineConfig(max_slots=1, max_seq_len=16)))
