"""How named pre-tokenizers cut text, against published tokenizer.json files and what they are known to do."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm.text import pretokenizers
from jaxopt_llm.text.pieces import _ALPHABET

SHARED = {
    "deepseek-v4": "deepseek-v3",
    "gpt-neox-olmo1": "olmo",
    "gpt2": "gpt-2",
    "smollm2-135m-instruct": "smollm",
}


def pieces(name: str, text: str) -> list[str]:
    cut = pretokenizers.by_name(name).build().pre_tokenize_str(text)
    return [bytes(_ALPHABET[ord(character)] for character in piece).decode() for piece, _ in cut]


@pytest.mark.parametrize(("directory", "name"), SHARED.items())
def test_published_files_are_recognised(directory, name, shared):
    parsed = json.loads((shared / "tokenizers" / directory / "tokenizer.json").read_text())
    assert pretokenizers.name_of(parsed) == name


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "It's 1234  x", ["It", "'s", " 1234", " ", " x"]),
        ("smollm", "It's 123", ["It", "'s", " ", "1", "2", "3"]),
        ("llama-bpe", "IT'S 12345!\n\n x", ["IT", "'S", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "IT'S 12!\n\n x", ["IT", "'S", " ", "1", "2", "!\n\n", " x"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("qwen2", "हिन्दी", ["ह", "िन", "्द", "ी"]),
        ("deepseek-v3", "x=1234日本", ["x", "=", "123", "4", "日本"]),
        ("gpt-4o", "camelCase don't/", ["camel", "Case", " don't", "/"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("kimi-k2", "ab日本CdE", ["ab", "日本", "Cd", "E"]),
        ("falcon", "a+=12345", ["a", "+=", "123", "45"]),
        ("deepseek-coder", "a b1\n", ["a", " b", "1", "\n"]),
        ("deepseek-llm", "ab µ日本 12", ["ab", " µ", "日本", " ", "12"]),
        ("bloom", "Hi there, you", ["Hi", " there", ",", " you"]),
        ("viking", "Hi 12", ["Hi", " ", "1", "2"]),
        ("seed-coder", "a!\n\n", ["a", "!", "\n\n"]),
        ("default", "a<b> 1234", ["a", "<", "b", ">", " ", "123", "4"]),
    ],
)
def test_pieces(name, text, expected):
    assert pieces(name, text) == expected


@given(st.sampled_from(sorted(pretokenizers._BY_NAME)), st.text())
def test_nothing_is_lost(name, text):
    cut = pretokenizers.by_name(name).build().pre_tokenize_str(text)
    assert bytes(_ALPHABET[ord(c)] for piece, _ in cut for c in piece) == text.encode()


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre='gpt-9'.*known:.*llama-bpe.*qwen2"):
        pretokenizers.by_name("gpt-9")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"model": {"ignore_merges": True}},
    ],
)
def test_what_gguf_has_no_name_for_is_refused(change):
    plain = {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {},
    }
    assert pretokenizers.name_of(plain) == "gpt-2"
    with pytest.raises(ValueError, match="GGUF has no name"):
        pretokenizers.name_of(plain | change)


def test_spelling_of_an_expression_does_not_matter():
    """Some files escape control characters, some take the matches, some what lies around them."""
    qwen = pretokenizers.by_name("qwen2").splits[0].replace(r"\r\n", "\r\n")
    split = {"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    parsed = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {},
    }
    assert pretokenizers.name_of(parsed) == "qwen2"
