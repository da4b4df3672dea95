"""What tokens say, against the decoders of `tokenizers`."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxopt_llm.text.pieces import Spelling


def test_byte_level_alphabet():
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = [chr(i) for i in [*range(0x800), *range(0x800, 0xD800, 64), 0x1F600, 0x40000]]
    vocab = {pre.pre_tokenize_str(character)[0][0]: i for i, character in enumerate(text)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    assert Spelling(backend).table(backend) == [character.encode() for character in text]


def test_every_token_as_its_decoder_has_it(tokenizer):
    """Twice the token, for the decoder of SentencePiece strips the first space."""
    for index in range(tokenizer.vocab_size):
        twice = tokenizer.backend.decode([index, index], skip_special_tokens=False)
        if "\ufffd" not in twice:
            piece = tokenizer.token_bytes(index).decode()
            assert twice == (piece + piece).removeprefix(" " if tokenizer.space_prefix else "")


def test_an_added_token_stands_for_itself():
    """`tokenizers` reads é as the byte E9 here, and loses it."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "a b": 1}, merges=[]))
    backend.add_tokens(["<é>", "Ġ"])
    backend.decoder = decoders.ByteLevel()
    assert Spelling(backend).table(backend) == [b"a", b"a b", "<é>".encode(), "Ġ".encode()]


@pytest.mark.parametrize(
    ("decoder", "space_prefix"),
    [
        (decoders.ByteLevel(), False),
        (decoders.Metaspace(), True),
        (decoders.Metaspace(prepend_scheme="never"), False),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]), True),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), False),
    ],
)
def test_space_prefix(decoder, space_prefix):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoder
    assert Spelling(backend).space_prefix == space_prefix


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), None])
def test_other_decoders_are_refused(decoder):
    backend = tokenizers.Tokenizer(models.BPE())
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match="neither byte-level BPE's nor SentencePiece's"):
        Spelling(backend)
