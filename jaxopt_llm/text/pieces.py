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


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


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
        self.space_prefix = any(
            _strips_space(step) for step in steps
        )  # encoding adds a space, decoding drops it

    def of(self, token: str, *, added: bool) -> bytes:
        """The bytes `token` stands for; an `added` token stands for itself."""
        if self.byte_level:
            if added or not all(character in _ALPHABET for character in token):
                return token.encode()
            return bytes(_ALPHABET[character] for character in token)
        if self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def table(self, backend: Backend) -> list[bytes]:
        """The bytes of every token by id; an id without a token has none."""
        added = backend.get_added_tokens_decoder()
        ids = backend.get_vocab(with_added_tokens=True)
        table = [b""] * (max(ids.values(), default=-1) + 1)
        for token, index in ids.items():
            table[index] = self.of(token, added=index in added)
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
