"""Hugging Face directories: every form that tokenizer files come in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxopt_llm.text import Tokenizer


@pytest.fixture
def directory(tmp_path: Path, stories: Tokenizer) -> Path:
    """stories260K's tokenizer.json, and nothing else."""
    (tmp_path / "tokenizer.json").write_text(stories.backend.to_str())
    return tmp_path


def write(path: Path, name: str, content: Any) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_save_and_load(tokenizer, tmp_path, wikitext):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.from_directory(str(tmp_path / "new" / "folder"))
    assert loaded.encode(wikitext) == tokenizer.encode(wikitext)
    for name in ("special_tokens", "eos_ids", "chat_templates", "space_prefix", "special_ids", "vocab_size"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_several_chat_templates_survive(stories, tmp_path):
    templates = {"default": "a", "tool_use": "b"}
    Tokenizer(stories.backend, chat_templates=templates).save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).chat_templates == templates


def test_tokenizer_json_alone(directory):
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.special_tokens, tokenizer.eos_ids, tokenizer.chat_templates) == ({}, set(), {})
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, None)
    assert tokenizer.encode("")[0] == 1  # its post-processor says so


@pytest.mark.parametrize("bos", ["<s>", {"__type": "AddedToken", "content": "<s>", "lstrip": False}])
def test_special_tokens(directory, bos):
    write(directory, "tokenizer_config.json", {"bos_token": bos, "pad_token": None, "model_max_length": 9})
    write(directory, "special_tokens_map.json", {"bos_token": "ignored", "eos_token": {"content": "</s>"}})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, True), (False, True)])
def test_config_overrules_the_post_processor(directory, bos, eos):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos}
    write(directory, "tokenizer_config.json", config)
    assert Tokenizer.from_directory(directory).encode("") == [1] * bos + [2] * eos


@pytest.mark.parametrize("value", ["false", 1, []])
def test_flags_that_are_none(directory, value):
    write(directory, "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": value})
    with pytest.raises(
        ValueError, match=r"add_bos_token in tokenizer_config\.json is .*; true or false was expected"
    ):
        Tokenizer.from_directory(directory)


def test_ends_come_from_every_file(directory):
    write(directory, "tokenizer_config.json", {"eos_token": "</s>"})
    write(directory, "generation_config.json", {"eos_token_id": [7, 8]})
    write(directory, "config.json", {"eos_token_id": 9, "bos_token_id": 1})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_ids == {2, 7, 8, 9}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_ids_name_the_tokens_that_no_file_names(directory):
    write(directory, "config.json", {"eos_token_id": [2, 9]})
    assert Tokenizer.from_directory(directory).special_tokens == {"eos_token": "</s>"}


def test_tokens_that_only_the_config_knows(directory):
    added = {"512": {"content": "<|end|>", "special": True}, "513": {"content": "<tool>", "special": False}}
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": added, "pad_token": "<pad>"})
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("<|end|><tool>", add_special=False, parse_special=True)[-2:] == [512, 513]
    assert tokenizer.encode("<tool>", add_special=False) == [513]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (514, 515)
    assert 512 in tokenizer.special_ids
    assert 513 not in tokenizer.special_ids


def test_added_token_with_another_id_is_refused(directory):
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": {"600": {"content": "<|end|>"}}})
    with pytest.raises(ValueError, match=r"'<\|end\|>' is 600 in tokenizer_config.json, but 512"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, {"default": "a"}),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "b"}]}},
            {"tool_use": "b"},
        ),
        (
            {"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "c"},
            {"default": "c"},
        ),
        (
            {"chat_template.jinja": "c", "additional_chat_templates/tool_use.jinja": "d"},
            {"default": "c", "tool_use": "d"},
        ),
    ],
)
def test_chat_templates(directory, files, expected):
    for name, content in files.items():
        write(directory, name, content)
    assert Tokenizer.from_directory(directory).chat_templates == expected


def test_vocab_and_merges(tmp_path, shared, wikitext):
    """GPT-2 as it was first published, against its tokenizer.json."""
    source = shared / "tokenizers" / "gpt2"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, tmp_path)
    end = {"50256": {"content": "<|endoftext|>", "special": True}}
    write(
        tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": end}
    )
    ours, theirs = Tokenizer.from_directory(tmp_path), Tokenizer.from_directory(source)
    assert ours.encode(wikitext) == theirs.encode(wikitext)
    assert ours.encode("a<|endoftext|>", parse_special=True)[-1] == 50256


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no tokenizer.json \(found: \[\]\)"),
        ({"tokenizer.model": "x"}, r"found: \['tokenizer.model'\].*save_pretrained"),
        ({"vocab.json": {}, "merges.txt": ""}, "needed for tokenizer_class=''"),
        (
            {
                "vocab.json": {"a": 0},
                "merges.txt": "b b",
                "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
            },
            "vocab.json and merges.txt do not fit",
        ),
        ({"tokenizer.json": "{"}, "tokenizer.json is malformed"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "must hold a JSON object, not list"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[" * 9999}, "tokenizer_config.json is not JSON"),
    ],
)
def test_what_is_missing_or_malformed(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="found: no such directory"):
        Tokenizer.from_directory(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"is malformed|is not UTF-8"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("value", [3, [{"name": [], "template": "x"}], [{"name": "default", "template": 3}]])
def test_bad_chat_template(directory, value):
    write(directory, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(ValueError, match=r"chat_template in tokenizer_config.json is (int|list)"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    "value",
    [[1], {"512": {}}, {"512": 7}, {"x": {"content": "a"}}, {"512": {"content": "a", "special": "no"}}],
)
def test_bad_added_tokens(directory, value):
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": value})
    with pytest.raises(ValueError, match=r"added_tokens_decoder in .* is malformed"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["abc", 1.5, 2**31, 2**100, [2, "3"], True, {}, -2])
def test_ids_that_are_none(directory, name, value):
    write(directory, name, {"eos_token_id": value})
    with pytest.raises(ValueError, match=rf"{name} has eos_token_id=.*; ids of tokens were expected"):
        Tokenizer.from_directory(directory)


def test_minus_one_is_no_id(directory):
    write(directory, "config.json", {"eos_token_id": [2, -1], "pad_token_id": -1})
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ({2}, None)
