"""From what a caller gives, a string, messages or token ids, one prompt or several, to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Array, Integer

from jaxopt_llm.models import ModelConfig
from jaxopt_llm.text import Message, Tokenizer

Prompt = str | Sequence[Message] | Sequence[SupportsIndex] | Integer[Array | np.ndarray, "T"]
Prompts = Prompt | Sequence[Prompt] | Integer[Array | np.ndarray, "B T"]

_FORMS = "a prompt is a string, a list of messages, or a list or array of token ids"


def several(given: Prompts) -> list[Prompt]:
    """One prompt or several as a list of prompts.

    Raises:
      ValueError: if it is neither, or mixes the two.
    """
    kind, parts = _read(given)
    return parts if kind in ("prompts", "nothing") else [parts]


def encode(prompt: Prompt, tokenizer: Tokenizer | None, config: ModelConfig, *, room: int = 1) -> list[int]:
    """The token ids of a prompt: a string as it is, special tokens in it read as such; messages by the chat template.

    Args:
      prompt: one.
      tokenizer: None where only token ids are given.
      config: vocabulary and context.
      room: tokens that must fit into the context after it.

    Raises:
      ValueError: if it is empty, too long, no prompt, has an id outside the vocabulary, or needs a tokenizer
        that is missing.
    """
    ids = _ids(prompt, tokenizer)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    outside = [token for token in ids if not 0 <= token < config.vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} lies outside the vocabulary of {config.vocab_size}")
    if len(ids) + room > config.max_seq_len:
        more = " so that at least one more fits" if room else ""
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the context is {config.max_seq_len}; shorten it{more}"
        )
    return ids


def _ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    kind, parts = _read(prompt)
    if kind == "prompts":
        raise ValueError("several prompts stand where one is wanted; give one")
    if kind in ("token ids", "nothing"):
        return parts
    if tokenizer is None:
        raise ValueError("text prompts need a tokenizer; without one, give token ids")
    if kind == "messages":
        return tokenizer.encode_chat(parts)
    return tokenizer.encode(parts, parse_special=True) if parts else []


def _read(given: Any) -> tuple[str, Any]:
    """What was given, as plain Python: a text, or a list of parts of one kind, and which."""
    given = _plain(given)
    if isinstance(given, str):
        return "text", given
    if _kind(given) != "prompts":
        raise ValueError(f"{_FORMS}, not a {type(given).__name__}")
    parts = [_plain(part) for part in given]
    kinds = {_kind(part) for part in parts} or {"nothing"}
    if len(kinds) > 1 or not kinds <= {"messages", "token ids", "prompts", "nothing"}:
        raise ValueError(f"{_FORMS}; this list holds {' and '.join(sorted(kinds))}")
    return kinds.pop(), parts


def _plain(value: Any) -> Any:
    """Arrays as lists of Python's numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _kind(part: Any) -> str:
    match part:
        case bool() | bytes():
            return type(part).__name__
        case Mapping():
            return "messages"
        case int():
            return "token ids"
        case str() | Sequence():
            return "prompts"
    return type(part).__name__
