"""GGUF metadata to tokenizers: against llama.cpp's ids, and against what a file may hold by mistake."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxopt_llm.cache import cache_folder
from jaxopt_llm.checkpoints import gguf
from jaxopt_llm.checkpoints.resolve import ALIASES
from jaxopt_llm.text import Tokenizer

# Of wikitext.txt's ids, from `benchmarks/tokenizer_agreement.py`, which found them equal to llama.cpp's.
DIGESTS = {
    "smollm2": "63f1cc78c9b347eacf1698647aac18db545246c36cb28f29318ef427592f2fca",
    "stories": "3c656df059a4d1b6a5110edea345abc0d32e81fd7b5b7e85adf161b899dcdbe4",
    "gemma3": "2ff29115415d79e763e49becd171925e140d9a577978514819d86b2f2bb5c91e",
}


def digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["smollm2", "stories"])
def test_ids_are_llama_cpps(name, wikitext, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(wikitext)
    assert digest(ids) == DIGESTS[name]
    assert tokenizer.decode(ids) == wikitext


def test_ids_are_llama_cpps_for_gemma3(wikitext):
    """262,144 pieces; only where the model has been downloaded."""
    path = cache_folder() / ALIASES["gemma3-270m"].file
    if not path.is_file():
        pytest.skip("gemma3-270m is not in the cache")
    with gguf.open_file(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    ids = tokenizer.encode(wikitext)
    assert digest(ids) == DIGESTS["gemma3"]
    assert tokenizer.decode(ids) == wikitext
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids) == (2, 0, {1, 106})
    assert tokenizer.encode("<b>  \n\n\n", add_special=False) == [200, 138, 109]  # user-defined tokens


def test_smollm2(smollm2):
    assert (smollm2.bos_id, smollm2.pad_id, smollm2.vocab_size) == (1, 2, 49152)
    assert smollm2.eos_ids == {
        0,
        2,
    }  # <|endoftext|> ends an answer too, though the file names only <|im_end|>
    assert smollm2.encode("x") == smollm2.encode("x", add_special=False)  # add_bos_token is false
    assert not smollm2.space_prefix


def test_stories(stories):
    assert (stories.bos_id, stories.pad_id, stories.eos_ids, stories.vocab_size) == (1, None, {2}, 512)
    assert stories.encode("") == [1]
    assert stories.encode("", add_special=False) == []
    assert stories.decode(stories.encode("日本\x00")) == "日本\x00"  # byte tokens
    assert stories.space_prefix


def test_special_tokens_in_text_are_text(smollm2, stories):
    assert 1 not in smollm2.encode("<|im_start|>")
    assert smollm2.encode("<|im_start|>", parse_special=True) == [1]
    assert stories.encode("<s>", add_special=False, parse_special=True) == [1]
    assert not {0, 1, 2} & set(stories.encode("<s></s><unk>", add_special=False))


def test_defaults_of_llama_cpp(stories_metadata, smollm2_metadata):
    bare = {key: value for key, value in stories_metadata.items() if "add_" not in key}
    assert Tokenizer.from_gguf(bare).encode("x")[0] == 1  # SentencePiece models start with BOS
    llama3 = {key: value for key, value in smollm2_metadata.items() if "add_" not in key}
    assert Tokenizer.from_gguf(llama3 | {"tokenizer.ggml.pre": "llama-bpe"}).encode("x")[0] == 1
    with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre"):
        Tokenizer.from_gguf({key: v for key, v in smollm2_metadata.items() if not key.endswith(".pre")})


def test_eos_and_eot(stories_metadata):
    extra = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_gguf(stories_metadata | extra)
    assert tokenizer.eos_ids == {2, 7}
    assert tokenizer.encode("")[-1] == 2


def test_chat_templates(stories_metadata):
    templates = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    listed = {"tokenizer.chat_templates": ["tool_use"]}
    tokenizer = Tokenizer.from_gguf(stories_metadata | templates | listed)
    assert tokenizer.chat_templates == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "model='bert' is unknown; known: 'gpt2'.*'llama'"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "must be an array of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' twice"),
        ({"scores": None}, "scores must hold one number for each of the 512 tokens"),
        ({"scores": [0.0]}, "scores must hold one number for each of the 512 tokens"),
        ({"token_type": ["x"] * 512}, "token_type must hold one number"),
        ({"bos_token_id": 512}, "bos_token_id=512 is not one of the 512 tokens"),
        ({"bos_token_id": None}, "add_bos_token is set, but tokenizer.ggml.bos_token_id is missing"),
    ],
)
def test_bad_sentencepiece_metadata(stories_metadata, change, message):
    changed = stories_metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf({key: value for key, value in changed.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "gpt-9"}, "pre='gpt-9'; known: .*smollm"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "'ab', which is not two tokens around a space"),
        ({"merges": ["qq qq"]}, "merges do not fit tokenizer.ggml.tokens: .*qq"),
    ],
)
def test_bad_byte_level_metadata(smollm2_metadata, change, message):
    changed = smollm2_metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf({key: value for key, value in changed.items() if value is not None})


def mutated(metadata: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """One key lost, replaced by something else, cut short, or with one entry changed."""
    key = generator.choice(sorted(metadata))
    value = metadata[key]
    choices = [None, -1, 2**40, "", "\ud800", 1.5, float("nan"), [], ["x"], [None], True]
    if isinstance(value, list) and generator.random() < 0.7:
        index = generator.randrange(len(value))
        swapped = [*value[:index], generator.choice([*choices, value[0]]), *value[index + 1 :]]
        return metadata | {key: generator.choice([value[:index], swapped])}
    changed = metadata | {key: generator.choice(choices)}
    return {name: value for name, value in changed.items() if value is not None}


def test_mutated_metadata_give_an_error_or_a_tokenizer(stories_metadata):
    generator = random.Random(0)
    for _ in range(300):
        try:
            tokenizer = Tokenizer.from_gguf(mutated(stories_metadata, generator))
        except ValueError:
            continue
        tokenizer.decode(tokenizer.encode("Once upon a time, 日本"))
