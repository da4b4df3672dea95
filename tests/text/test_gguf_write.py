"""Tokenizers into GGUF metadata: rebuilt from there they give the ids of the original."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxopt_llm.text import Tokenizer
from jaxopt_llm.text.gguf_read import TokenType

SHARED = ("deepseek-v4", "gpt-neox-olmo1", "gpt2", "smollm2-135m-instruct", "qwen2.5")


@pytest.fixture(scope="module", params=SHARED)
def pair(request, shared) -> tuple[Tokenizer, Tokenizer]:
    """A published tokenizer, and what we rebuild from the metadata that we write for it."""
    original = Tokenizer.from_directory(shared / "tokenizers" / request.param)
    return original, Tokenizer.from_gguf(original.to_gguf())


def test_published_tokenizers_survive(pair, wikitext):
    original, rebuilt = pair
    ids = original.encode(wikitext)
    assert rebuilt.encode(wikitext) == ids
    assert rebuilt.decode(ids) == original.decode(ids) == wikitext
    assert rebuilt.special_tokens == original.special_tokens
    assert rebuilt.chat_templates == original.chat_templates
    assert rebuilt.eos_ids >= original.eos_ids


def test_published_tokenizers_survive_any_text(pair):
    """Also text that is not normalised, and tokens written out in it."""
    original, rebuilt = pair
    marks = sorted(token.content for token in original.backend.get_added_tokens_decoder().values())
    texts = st.lists(st.one_of(st.text(), st.sampled_from([*marks, "  ", "é", "1234", "\r\n"]))).map("".join)

    @given(texts, st.booleans())
    def check(text, parse_special):
        ids = original.encode(text, parse_special=parse_special)
        assert rebuilt.encode(text, parse_special=parse_special) == ids
        assert rebuilt.decode(ids, skip_special=False) == original.decode(ids, skip_special=False)

    check()


def test_every_token_is_the_same(pair):
    original, rebuilt = pair
    ids = range(original.vocab_size)
    assert rebuilt.vocab_size == original.vocab_size
    assert rebuilt.to_bytes(ids, skip_special=False) == original.to_bytes(ids, skip_special=False)
    assert rebuilt.special_ids == original.special_ids


def test_metadata_of_a_published_file_come_back(smollm2, smollm2_metadata):
    written = smollm2.to_gguf()
    assert {key: written[key] for key in smollm2_metadata if key in written} == {
        key: value for key, value in smollm2_metadata.items() if not key.endswith("add_space_prefix")
    }
    assert written["tokenizer.ggml.eot_token_id"] == 0


def test_sentencepiece_comes_back(stories, stories_metadata, wikitext):
    written = stories.to_gguf()
    differs = {key for key, value in stories_metadata.items() if written.get(key) != value}
    assert differs == {"tokenizer.ggml.scores"}  # the same order, told by other numbers
    assert Tokenizer.from_gguf(written).encode(wikitext) == stories.encode(wikitext)


def byte_level(**options) -> tokenizers.Tokenizer:
    vocab = {character: i for i, character in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def test_an_id_without_a_token_gets_a_filler():
    parsed = json.loads(byte_level().to_str())
    parsed["model"]["vocab"]["ab"] = 258
    metadata = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parsed))).to_gguf()
    assert metadata["tokenizer.ggml.tokens"][256:] == ["[PAD256]", "[PAD257]", "ab"]
    assert metadata["tokenizer.ggml.token_type"][256:] == [
        TokenType.UNUSED,
        TokenType.UNUSED,
        TokenType.NORMAL,
    ]
    assert Tokenizer.from_gguf(metadata).encode("ab") == [258]


def test_bos_and_eos_around_the_text():
    backend = byte_level()
    backend.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 257), ("</s>", 258)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    metadata = Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}).to_gguf()
    assert Tokenizer.from_gguf(metadata).encode("ab") == [257, 256, 258]
    with pytest.raises(ValueError, match=r"puts \[257\], \[258\]"):
        Tokenizer(backend).to_gguf()


def test_three_ends_and_no_more():
    backend = byte_level()
    backend.add_special_tokens(["<1>", "<2>", "<3>", "<4>"])
    ends = {"eos_token": "<1>"}
    three = Tokenizer(backend, special_tokens=ends, eos_ids={257, 258, 259})
    assert Tokenizer.from_gguf(three.to_gguf()).eos_ids == {257, 258, 259}
    with pytest.raises(ValueError, match="three end tokens"):
        Tokenizer(backend, special_tokens=ends, eos_ids={257, 258, 259, 260}).to_gguf()


def test_flags_that_gguf_lacks_are_refused():
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(ValueError, match="flag of '<mask>'"):
        Tokenizer(backend).to_gguf()


def sentencepiece(normalizer, pre_tokenizer) -> Tokenizer:
    scores = {"▁": -2, "a": -3, "b": -4, "▁a": 0, "ab": -1, "▁ab": -1.5}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab")]
    vocab = {piece: i for i, piece in enumerate(scores)} | {f"<0x{i:02X}>": 6 + i for i in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(backend)


ESCAPE = normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (ESCAPE, None, False),  # Gemma from GGUF
        (ESCAPE, pre_tokenizers.Split(" ", "merged_with_previous"), False),  # Gemma's tokenizer.json
        (normalizers.Sequence([normalizers.Prepend("▁"), ESCAPE]), None, True),  # Llama 2's
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),  # Mistral's
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
    ],
)
def test_sentencepiece_in_its_published_forms(normalizer, pre_tokenizer, prefix):
    original = sentencepiece(normalizer, pre_tokenizer)
    metadata = original.to_gguf()
    assert metadata["tokenizer.ggml.add_space_prefix"] == prefix
    metadata |= {"tokenizer.ggml.unknown_token_id": 6}
    for text in ("", "ab", "a  ab b", "é"):
        assert Tokenizer.from_gguf(metadata).encode(text) == original.encode(text)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (None, None),
        (normalizers.NFKC(), None),
        (ESCAPE, pre_tokenizers.Digits()),
        (None, pre_tokenizers.Metaspace()),
    ],
)
def test_other_sentencepiece_forms_are_refused(normalizer, pre_tokenizer):
    with pytest.raises(ValueError, match="GGUF cannot express"):
        sentencepiece(normalizer, pre_tokenizer).to_gguf()
