"""What comes out."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float


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
      finish_reason: `stop` (end of sequence, or a stop string), `length`, `cancelled` or `error`.
      prompt_tokens: length of the prompt.
      cached_tokens: of the prompt, whose keys and values were there from earlier requests.
      logprobs: one entry a token if asked for.
      error: what went wrong, where `finish_reason` says so.
      ttft_ms: from the call to the first token.
      tpot_ms: mean time between later tokens; None with fewer than two.
      token_ms: when each token was there, from the call.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[TokenLogprob] | None
    error: str | None
    ttft_ms: float
    tpot_ms: float | None
    token_ms: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a stream.

    Attributes:
      text: new text; empty where there is no tokenizer.
      token_ids: new tokens. Those whose text is not whole yet (bytes of a character, what may begin a stop string)
        are here before it.
      result: the whole, in the last piece.
    """

    text: str
    token_ids: list[int]
    result: Result | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a prompt is.

    Attributes:
      logprobs: of each token after the first, given those before it.
      greedy: whether it is the likeliest there.
      error: what went wrong, else None; there is nothing then in the other two.
    """

    logprobs: Float[np.ndarray, "n"]
    greedy: Bool[np.ndarray, "n"]
    error: str | None
