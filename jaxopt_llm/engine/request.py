"""What goes in and what comes out."""

import dataclasses
from collections.abc import Sequence

from jaxopt_llm.text import Message

Prompt = str | Sequence[Message] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability, under the model's own distribution, of a chosen token and of the best ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one prompt gave.

    Attributes:
      text: the generated text, without stop string or special tokens; empty where there is no tokenizer.
      token_ids: every generated token, the one that ended it included.
      finish_reason: `stop` (end of sequence, or a stop string) or `length`.
      prompt_tokens: length of the prompt.
      logprobs: one entry a token if asked for.
      ttft_ms: from the call to the first token.
      tpot_ms: mean time between later tokens; None with fewer than two.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None
    ttft_ms: float
    tpot_ms: float | None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a stream: new text, and the whole result once it is there."""

    text: str
    result: Result | None = None
