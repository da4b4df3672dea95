"""One request from the user's side: what was asked for, and what has come of it so far."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxopt_llm.engine.plan import Piece, Request
from jaxopt_llm.engine.program import Out, Sampled
from jaxopt_llm.engine.request import Result, TokenLogprob
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.text import Detokenizer, Tokenizer

Allowed = Callable[[Sequence[int]], Bool[np.ndarray, "V"] | None]


_NO_NUMBERS = (
    "the scores for this request, of the model or after processors, are no numbers (NaN or infinite)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a request wants of its prompt beside, or instead of, new tokens.

    Attributes:
      scores: the log-probability of each prompt token after the first.
      hidden: the last hidden state of each prompt token.
    """

    scores: bool = False
    hidden: bool = False


class Generation:
    """A request under way.

    Args:
      request: as the scheduler knows it.
      params: settings.
      seed: of its noise.
      stop_ids: tokens that end it.
      tokenizer: for its text, or None.
      start: when it was asked for, seconds.
      wanted: of its prompt.
      allowed: tokens so far to which tokens may come next, or None for all.
    """

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        *,
        seed: int,
        stop_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        start: float,
        wanted: Wanted = Wanted(),
        allowed: Allowed | None = None,
    ):
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.request, self.params, self.seed, self.stop_ids = request, params, seed, stop_ids
        self.wanted, self.allowed = wanted, allowed
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.scores: list[tuple[float, int]] = []
        self.hidden: list[np.ndarray] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        prompt = request.prompt
        self._text = Detokenizer(tokenizer, prompt=prompt, stop=params.stop) if tokenizer else None
        self._pieces: list[str] = []
        self._shown = self._given = 0  # pieces and tokens that `fresh` has told
        self._start = start
        self._times: list[float] = []

    @property
    def full(self) -> bool:
        """Whether only the full program does what it asks for."""
        return self.params.needs_full or self.allowed is not None or self.measures

    @property
    def measures(self) -> bool:
        """Whether anything is wanted of its prompt's tokens."""
        return self.wanted != Wanted()

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether there is text, or without a tokenizer a token, that `fresh` has not told yet."""
        return self._given < len(self.tokens) if self._text is None else self._shown < len(self._pieces)

    def add(self, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """Takes in the next token."""
        self._times.append(now)
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        stopped = token in self.stop_ids
        if self._text is not None and not stopped:
            self._say(self._text.add([token]))
            stopped = self._text.stopped is not None
        if stopped:
            self.end("stop")
        elif len(self.tokens) == self.request.max_tokens:
            self.end("length")

    def take_prompt(self, piece: Piece, out: Out, at: int) -> None:
        """Takes what is wanted of the prompt's tokens in this piece, which start at `at` in the step."""
        request, place = self.request, slice(at, at + piece.length)
        if self.ended:
            return
        if piece.begins:  # the first time, or once more after a preemption
            self.scores.clear()
            self.hidden.clear()
        if self.wanted.scores:
            assert out.target_logprob is not None and out.best is not None, "of the full program"
            logprobs, best = out.target_logprob[place], out.best[place]
            self.scores.extend(zip(logprobs.tolist(), best.tolist(), strict=True))
            self._check(logprobs)
        if self.wanted.hidden:
            assert out.hidden is not None, "of the full program"
            self.hidden.append(out.hidden[place].astype(np.float32))
            self._check(self.hidden[-1])
        if not request.max_tokens and piece.start + piece.length == len(request.prompt):
            self.end("length")

    def take_tokens(self, piece: Piece, sampled: Sampled, row: int, now: float) -> list[int]:
        """Takes the tokens that came of a piece, up to the one that ends it; which they are."""
        tokens: list[int] = []
        for i in range(piece.limit):
            if self.ended:
                break
            if not sampled.finite[i, row]:
                self.end("error", _NO_NUMBERS)
                break
            tokens.append(int(sampled.tokens[i, row]))
            self.add(tokens[-1], _logprob(sampled, i, row, self.params.logprobs), now)
        return tokens

    def _check(self, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            self.end("error", _NO_NUMBERS)

    def may_come(self, vocab_size: int) -> Bool[np.ndarray, "V"] | None:
        """Which tokens may come next, None for all; if the request's own function fails, the request does."""
        if self.allowed is None or self.ended:
            return None
        try:
            allowed = self.allowed(self.tokens)
            return None if allowed is None else _choice(allowed, vocab_size)
        except Exception as error:
            self.end("error", f"the function of allowed tokens failed: {error}")
            return None

    def end(self, reason: str, error: str | None = None) -> None:
        """No more tokens come; the first reason stays."""
        if self.ended:
            return
        if self._text is not None:
            self._say(self._text.flush())
        self.error = error
        self.finish_reason = reason  # last: whoever sees it, in another thread, sees all of it

    def fresh(self) -> tuple[str, list[int]]:
        """Text and tokens since the last call."""
        pieces = self._pieces[self._shown :]  # another thread may add to them
        tokens = self.tokens[self._given :]  # after the text, which comes of tokens
        self._shown += len(pieces)
        self._given += len(tokens)
        return "".join(pieces), tokens

    def result(self) -> Result:
        times = [(at - self._start) * 1e3 for at in self._times]
        later = len(times) - 1
        return Result(
            text="".join(self._pieces),
            token_ids=self.tokens,
            finish_reason=self.finish_reason or "length",
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.request.cached_tokens,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            error=self.error,
            ttft_ms=times[0] if times else 0.0,
            tpot_ms=(times[-1] - times[0]) / later if later > 0 else None,
            token_ms=tuple(times),
        )

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)


def _choice(allowed: Any, vocab_size: int) -> Bool[np.ndarray, "V"]:
    allowed = np.asarray(allowed)
    if allowed.shape != (vocab_size,) or allowed.dtype != bool:
        raise ValueError(f"it gave {allowed.dtype}{list(allowed.shape)} and must give bool[{vocab_size}]")
    if not allowed.any():
        raise ValueError("it allows no token")
    return allowed


def _logprob(sampled: Sampled, step: int, row: int, count: int | None) -> TokenLogprob | None:
    if count is None:
        return None
    assert sampled.logprob is not None and sampled.top_ids is not None and sampled.top_logprobs is not None
    ids, values = sampled.top_ids[step, row, :count], sampled.top_logprobs[step, row, :count]
    top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return TokenLogprob(int(sampled.tokens[step, row]), float(sampled.logprob[step, row]), top)
