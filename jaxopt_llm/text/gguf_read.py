"""Tokenizers out of GGUF metadata: the specification's `tokenizer.ggml.*` keys, read as llama.cpp reads them.

Two kinds: model `gpt2` is byte-level BPE with a named pre-tokenizer; model `llama` is SentencePiece BPE.
"""

import warnings
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from jaxopt_llm.text import pretokenizers, spm

PREFIX = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"

# GGUF's name for each role, by transformers' name.
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Control tokens that end a turn whatever the metadata say: a file names one end, chat models have several.
_OPENAI_ENDS = ("<|endoftext|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>")
_LLAMA_ENDS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
_OTHER_ENDS = ("<end_of_turn>", "<EOT>", "<end_of_utterance>", "<｜end▁of▁sentence｜>")
TURN_ENDS = frozenset({*_OPENAI_ENDS, *_LLAMA_ENDS, *_OTHER_ENDS})


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # matched in the text before anything else, and shown
    UNUSED = 5
    BYTE = 6


class GGUFVocabulary:
    """The tokenizer in a GGUF file's metadata.

    Raises:
      ValueError: says which key is missing, malformed or unknown.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata
        self._tokens = self._strings("tokens")
        if len(set(self._tokens)) != len(self._tokens):
            once: set[str] = set()
            twice = next(token for token in self._tokens if token in once or once.add(token))  # type: ignore[func-returns-value]
            raise ValueError(f"{PREFIX}tokens holds {twice!r} twice")
        self._types = [int(TokenType.NORMAL)] * len(self._tokens)
        if self._get("token_type") is not None:
            self._types = self._numbers("token_type")

    def backend(self) -> Backend:
        """The tokenizer itself."""
        model = self._get("model")
        if model not in ("gpt2", "llama"):
            raise ValueError(
                f"{PREFIX}model={model!r} is unknown; known: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)"
            )
        backend = self._byte_level_bpe() if model == "gpt2" else self._sentencepiece()
        special = self._of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        user_defined = self._of_type(TokenType.USER_DEFINED)
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
        add_bos = model == "llama" or self._pre_tokenizer().add_bos
        backend.post_processor = template(self._around("bos", add_bos), self._around("eos", False))
        return backend

    def special_tokens(self) -> dict[str, str]:
        """The text of the tokens with a role, by transformers' name of the role."""
        ids = {role: self._id(name) for role, name in ROLES.items()}
        return {role: self._tokens[index] for role, index in ids.items() if index is not None}

    def eos_ids(self) -> set[int]:
        """Ids that end an answer: those named, and control tokens known to end a turn."""
        ends = TURN_ENDS
        if "<|return|>" in self._tokens:
            ends = ends - {"<|end|>"}  # gpt-oss goes on after it, with another message
        known = {self._tokens.index(token) for token in self._of_type(TokenType.CONTROL) if token in ends}
        named = (self._id(role) for role in ("eos", "eot", "eom"))
        return known | {index for index in named if index is not None}

    def chat_templates(self) -> dict[str, str]:
        """`tokenizer.chat_template` as "default", `tokenizer.chat_template.NAME` as NAME."""
        found = {key: text for key, text in self._metadata.items() if key.startswith(CHAT_TEMPLATE)}
        names = {key: key.removeprefix(CHAT_TEMPLATE).removeprefix(".") or "default" for key in found}
        return {names[key]: text for key, text in found.items() if isinstance(text, str) and text}

    def _byte_level_bpe(self) -> Backend:
        pre = self._pre_tokenizer()
        merges = []
        for merge in self._strings("merges"):
            left, space, right = merge.partition(" ")
            if not (left and space and right) or " " in right:
                raise ValueError(f"{PREFIX}merges holds {merge!r}, which is not two tokens around a space")
            merges.append((left, right))
        backend = Backend(self._bpe(merges, ignore_merges=pre.ignore_merges))
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre.build()
        backend.decoder = decoders.ByteLevel()
        return backend

    def _sentencepiece(self) -> Backend:
        # As in SentencePiece, plain text never merges into a control, unknown or byte token.
        merged = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        rows = zip(self._tokens, self._numbers("scores"), self._types, strict=True)
        merges = spm.merges_from_scores({token: score for token, score, type_ in rows if type_ in merged})
        unknown = self._tokens[self._id("unknown", default=0) or 0]
        backend = Backend(self._bpe(merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
        escape = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._get("add_space_prefix", True):
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape])
            backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        else:
            backend.normalizer = escape
            backend.decoder = decoders.Sequence(steps)
        return backend

    def _bpe(self, merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
        vocab = {token: index for index, token in enumerate(self._tokens)}
        try:
            return models.BPE(vocab=vocab, merges=merges, **options)
        except Exception as error:  # tokenizers raises no narrower one
            raise ValueError(f"{PREFIX}merges do not fit {PREFIX}tokens: {error}") from error

    def _pre_tokenizer(self) -> pretokenizers.PreTokenizer:
        name = self._get("pre")
        if name is None:
            warnings.warn(f"no {PREFIX}pre: 'default' as in llama.cpp; the ids may be wrong", stacklevel=2)
        return pretokenizers.by_name("default" if name is None else name)

    def _around(self, role: str, default: bool) -> tuple[str, int] | None:
        """The token, and its id, that goes at this end of every text, if one does."""
        if not self._get(f"add_{role}_token", default):
            return None
        index = self._id(role)
        if index is None:
            raise ValueError(f"{PREFIX}add_{role}_token is set, but {PREFIX}{role}_token_id is missing")
        return self._tokens[index], index

    def _of_type(self, *types: TokenType) -> list[str]:
        return [token for token, type_ in zip(self._tokens, self._types, strict=True) if type_ in types]

    def _id(self, role: str, default: int | None = None) -> int | None:
        index = self._get(f"{role}_token_id", default)
        if index is None:
            return None
        if not isinstance(index, int | np.integer) or not 0 <= index < len(self._tokens):
            raise ValueError(f"{PREFIX}{role}_token_id={index} is not one of the {len(self._tokens)} tokens")
        return int(index)

    def _get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(PREFIX + name, default)

    def _strings(self, name: str) -> list[str]:
        values = self._get(name)
        if values is None:
            raise ValueError(f"the GGUF metadata have no {PREFIX}{name}, so the tokenizer cannot be rebuilt")
        if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{PREFIX}{name} must be an array of strings")
        return list(values)

    def _numbers(self, name: str) -> list[Any]:
        values, count = self._get(name, ()), len(self._tokens)
        listed = list(values) if isinstance(values, Sequence | np.ndarray) else []
        if len(listed) != count or not all(isinstance(value, int | float | np.number) for value in listed):
            raise ValueError(f"{PREFIX}{name} must hold one number for each of the {count} tokens")
        return listed


def template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """Puts tokens, given with their ids, before and after every text that is encoded."""
    single = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
    special = list(dict.fromkeys(token for token in (bos, eos) if token))
    return processors.TemplateProcessing(single=single, special_tokens=special)
