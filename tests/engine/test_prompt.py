"""Prompts of every form become ids; what is no prompt is told."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, SamplingParams
from jaxopt_llm.engine.prompt import several

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def engine(data_dir):
    model, tokenizer = jo.load(data_dir / "stories260K.gguf")
    tokenizer.chat_templates["default"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Engine(model, tokenizer)


IDS = [
    [1, 2, 3],
    (1, 2, 3),
    range(1, 4),
    [np.int64(1), jnp.asarray(2), 3],
    np.array([1, 2, 3]),
    np.array([1, 2, 3], np.uint8),
    jnp.array([1, 2, 3]),
]


@pytest.mark.parametrize("prompt", IDS, ids=lambda prompt: type(prompt).__name__)
def test_token_ids(engine, prompt):
    assert engine.encode(prompt) == [1, 2, 3]
    (result,) = engine.generate(prompt, SamplingParams(max_tokens=1))
    assert result.prompt_tokens == 3


def test_text_and_messages(engine):
    assert engine.encode("hi") == engine.tokenizer.encode("hi")
    assert engine.encode([USER, USER]) == engine.tokenizer.encode("hihi", add_special=False)
    assert engine.encode((USER,)) == engine.tokenizer.encode("hi", add_special=False)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi", [1, 2], [USER], jnp.array([3])], ["hi", [1, 2], [USER], [3]]),
        ([USER, USER], [[USER, USER]]),
        ([1, 2], [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_one_or_several(given, prompts):
    assert several(given) == prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([[1, 512]], "512 lies outside the vocabulary of 512"),
        (jnp.array([1, -1]), "-1 lies outside"),
        ([[1] * 512], "512 tokens and the context is 512"),
        ([USER, "y"], "this list holds messages and prompts"),
        ([[USER, "y"]], "this list holds messages and prompts"),
        ([1, "y"], "this list holds prompts and token ids"),
        ([1, [2]], "this list holds prompts and token ids"),
        ([1.5, 2], "this list holds float and token ids"),
        ([True, False], "this list holds bool"),
        (jnp.array([1.0, 2.0]), "this list holds float"),
        ([[[1]]], "several prompts stand where one is wanted"),
        (USER, "a list or array of token ids, not a dict"),
        (b"hi", "not a bytes"),
        (5, "not a int"),
        (None, "not a NoneType"),
        ([None], "this list holds NoneType"),
        ([[{"content": "hi"}]], "a mapping with a 'role'"),
    ],
)
def test_what_is_no_prompt_is_told(engine, given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        engine.generate(given, SamplingParams())


def test_text_needs_a_tokenizer(engine, data_dir):
    bare = Engine(jo.load(data_dir / "stories260K.gguf")[0])
    for prompt in ("hi", [USER]):
        with pytest.raises(ValueError, match="need a tokenizer"):
            bare.encode(prompt)


def test_messages_need_a_template(data_dir):
    with pytest.raises(ValueError, match="chat template"):
        jo.generate(*jo.load(data_dir / "stories260K.gguf"), [USER])
