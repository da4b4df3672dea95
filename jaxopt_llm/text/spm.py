"""SentencePiece BPE as ranked merges, and back.

SentencePiece merges, again and again, the neighbours that make the piece with the highest score, the leftmost
first (sentencepiece/src/bpe_model.cc); ranked BPE merges the pair with the lowest rank. Ranking every way to
split a piece by the score of the piece makes them the same.
"""

from collections.abc import Mapping, Sequence


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first; equal scores keep the order given.

    The splits of one piece have neighbouring ranks, where SentencePiece goes by position. It would matter
    only in a text like `[er][e][re]`, and merging best first does not leave one.
    """
    pieces = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    return [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]


def scores_from_merges(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """A score a piece that ranks as `merges` do: 0 for the first made, -1 for the next, unmade pieces last.

    Args:
      pieces: the pieces that take part in merging, in id order.
      merges: pairs in rank order, of which those that make, or need, anything else are left aside.

    Raises:
      ValueError: if the merges are not those of any scores, so that SentencePiece could not follow them.
    """
    known = set(pieces)
    relevant = [(left, right) for left, right in merges if {left, right, left + right} <= known]
    made = dict.fromkeys(left + right for left, right in relevant)
    order = [*made, *(piece for piece in pieces if piece not in made)]
    scores = {piece: -float(rank) for rank, piece in enumerate(order)}
    if not _agree(relevant, merges_from_scores(scores)):
        raise ValueError(
            "this tokenizer's merges do not come from SentencePiece scores, so GGUF's model 'llama' cannot "
            "hold them; keep the Hugging Face or Orbax form"
        )
    return scores


def _agree(merges: Sequence[tuple[str, str]], derived: Sequence[tuple[str, str]]) -> bool:
    """The same pairs, making pieces in the same order; the order among one piece's splits is free."""

    def made(pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [left + right for left, right in pairs]

    return len(merges) == len(derived) and set(merges) == set(derived) and made(merges) == made(derived)
