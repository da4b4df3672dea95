"""Ranked merges against SentencePiece's own algorithm, written plainly."""

import itertools

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from jaxopt_llm.text import spm


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Merges the neighbours whose joined piece scores best, the leftmost first, until none are left."""
    symbols = list(text)
    while True:
        joined = [
            (-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores
        ]
        if not joined:
            return symbols
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def ranked(text: str, scores: dict[str, float]) -> list[str]:
    vocab = {piece: i for i, piece in enumerate(scores)}
    merges = spm.merges_from_scores(scores)
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges)).encode(text).tokens


def trained(corpus: list[str], size: int) -> dict[str, float]:
    """Scores as SentencePiece's trainer gives them: minus the order in which pieces were made."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    return {piece: -float(i) for piece, i in sorted(bpe.get_vocab().items(), key=lambda item: item[1])}


@given(st.lists(st.text("ab", min_size=4, max_size=40), min_size=1, max_size=8), st.text("ab", max_size=60))
def test_same_pieces_as_sentencepiece(corpus, text):
    scores = {"a": -1000.0, "b": -1001.0} | trained(corpus, 40)
    assert ranked(text, scores) == sentencepiece(text, scores)


@given(st.lists(st.text("ab", min_size=2, max_size=6), max_size=30, unique=True), st.text("ab", max_size=60))
def test_same_pieces_with_any_scores(pieces, text):
    scores = {"a": -1000.0, "b": -1001.0} | {piece: -float(i) for i, piece in enumerate(pieces)}
    assert ranked(text, scores) == sentencepiece(text, scores)


def test_scores_from_merges_is_the_inverse():
    scores = trained(["the cat sat on the mat", "a hat, a bat, a rat that sat"], 60)
    merges = spm.merges_from_scores(scores)
    assert spm.merges_from_scores(spm.scores_from_merges(list(scores), merges)) == merges


def test_merges_without_scores_are_refused():
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c")]  # byte-pair training never looked at (a, bc)
    pieces = ["a", "b", "c", "d", "ab", "cd", "bc", "abcd", "bcd"]
    with pytest.raises(ValueError, match="do not come from SentencePiece scores"):
        spm.scores_from_merges(pieces, merges)
