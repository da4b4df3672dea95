"""What each token says, in bytes: the two ways that tokens of language models spell text.

Byte-level BPE writes every byte as one printable character; SentencePiece writes text with "▁" for a space,
and lone bytes as `<0x0A>`. Bytes are joined before they are read as UTF-8, so a character may span tokens.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[int, int]:
    """The byte that each of GPT-2's printable characters stands for (openai/gpt-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_NO_BYTE = 0xFFFF
_ALPHABET = dict.fromkeys(range(256), _NO_BYTE) | _byte_level_alphabet()


class Spelling:
    """How a tokenizer's tokens spell text, read from its decoder.

    Raises:
      ValueError: if the decoder is neither byte-level nor SentencePiece's (WordPiece, say).
    """

    def __init__(self, backend: Backend):
        steps = list(_steps(json.loads(backend.decoder.__getstate__()))) if backend.decoder else []
        kinds = {step["type"] for step in steps}
        self.byte_level = "ByteLevel" in kinds
        self.byte_tokens = "ByteFallback" in kinds
        spaces = [step for step in steps if _says_space(step)]
        if not self.byte_level and not spaces:
            raise ValueError(
                f"the tokenizer's decoder is {sorted(kinds)}, neither byte-level BPE's nor SentencePiece's"
            )
        # What decoding drops, encoding has put before the text.
        self.space_prefix = any(_strips_space(step) for step in steps)

    def table(self, backend: Backend) -> list[bytes]:
        """The bytes of every token by id; an id without a token has none."""
        ids = backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(ids.values(), default=-1) + 1)
        for token, index in ids.items():
            if not self.byte_level:
                byte = _BYTE_TOKEN.fullmatch(token) if self.byte_tokens else None
                table[index] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
                continue
            try:
                table[index] = token.translate(_ALPHABET).encode("latin-1")
            except UnicodeEncodeError:  # a character that stands for no byte
                table[index] = token.encode()
        for index, added in backend.get_added_tokens_decoder().items():
            if self.byte_level or added.special:  # they stand for themselves
                table[index] = added.content.encode()
        return table


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _steps(part)
    else:
        yield decoder


def _says_space(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Metaspace" or (
        step["type"] == "Replace" and step["pattern"] == {"String": "▁"} and step["content"] == " "
    )


def _strips_space(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Strip" and step["content"] == " " and step["start"] > 0
