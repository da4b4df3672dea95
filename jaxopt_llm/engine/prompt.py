"""Prompts to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_llm.engine.request import Prompt
from jaxopt_llm.text import Tokenizer


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or several were given."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    alone = bool(items) and all(isinstance(item, Mapping | int | np.integer) for item in items)
    return [items] if alone else items


def encode(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The token ids of a prompt.

    Raises:
      ValueError: if it is empty, has an id outside the vocabulary, or needs a tokenizer that is missing.
    """
    ids = _ids(prompt, tokenizer)
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} lies outside the vocabulary of {vocab_size}")
    return ids


def _ids(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    messages = [item for item in prompt if isinstance(item, Mapping)]
    if not isinstance(prompt, str) and not messages:
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        raise ValueError("text prompts need a tokenizer; without one, give token ids")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, parse_special=True) if prompt else []
    return tokenizer.encode_chat(messages)
