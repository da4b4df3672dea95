"""The public surface: text to ids and back."""

import threading

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxopt_llm.text import Tokenizer


@given(st.text())
def test_text_comes_back(stories, text):
    """All of it but ▁, which is SentencePiece's space."""
    text = text.replace("▁", " ")
    assert stories.decode(stories.encode(text)) == text
    ids = stories.encode(text, add_special=False)
    assert stories.to_bytes(ids) == (f" {text}" if text else "").encode()


@given(st.lists(st.text(), max_size=5))
def test_a_batch_gives_what_each_gives(tokenizer, texts):
    batch = tokenizer.encode_batch(texts, add_special=False)
    assert batch == [tokenizer.encode(text, add_special=False) for text in texts]


@given(st.text("ab \n"), st.text("ab \n"))
def test_tokens_join_as_bytes(smollm2, left, right):
    ids = smollm2.encode(left) + smollm2.encode(right)
    assert smollm2.decode(ids) == left + right


def test_special_tokens_are_left_out_unless_wanted(smollm2):
    ids = [1, *smollm2.encode("user"), 2]
    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"
    assert smollm2.token_bytes(2) == b"<|im_end|>"


@pytest.mark.parametrize("make", [list, tuple, np.array, iter])
def test_ids_in_any_form(smollm2, make):
    assert smollm2.decode(make(smollm2.encode("The sky"))) == "The sky"


def test_ids_without_a_token_are_nothing(smollm2):
    assert smollm2.decode([smollm2.vocab_size, 10**9]) == ""
    with pytest.raises(ValueError, match="token ids are not negative, but one is -1"):
        smollm2.decode([5, -1])


def test_bytes_that_are_not_utf8_are_replaced(stories):
    byte = stories.backend.token_to_id("<0xE6>")
    assert stories.decode([byte]) == "\ufffd"
    assert stories.token_bytes(byte) == b"\xe6"


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D83D at 2\)"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_batch(["fine", "\udcff"])


def test_truncation_and_padding_in_the_file_are_off():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    assert Tokenizer(backend).encode("aaa") == [0, 0, 0]


def test_threads_do_not_see_each_others_options(smollm2):
    """`parse_special` is a setting of the one backend."""
    wrong = []

    def work(parse_special: bool) -> None:
        for _ in range(300):
            found = 1 in smollm2.encode("<|im_start|>", parse_special=parse_special)
            if found != parse_special:
                wrong.append(parse_special)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_repr(stories):
    assert repr(stories).startswith("Tokenizer(vocab_size=512, special_tokens={'bos_token': '<s>'")


@given(st.text())
def test_without_a_token_for_every_byte_the_rest_comes_back(smollm2, text):
    """SmolLM2's vocabulary lacks the 21 bytes that its training text had not; llama.cpp drops them too."""
    assume(smollm2.decode(smollm2.encode(text)) != text)
    assert not set(text.encode()) <= set(b"".join(map(smollm2.token_bytes, range(252))))
