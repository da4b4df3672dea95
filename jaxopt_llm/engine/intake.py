"""What callers ask for, as requests; what cannot be is refused."""

import dataclasses
import itertools
import time

import numpy as np

from jaxopt_llm.engine import prompt as prompts
from jaxopt_llm.engine.generation import Allowed, Generation, Wanted
from jaxopt_llm.engine.plan import Request
from jaxopt_llm.engine.prompt import Prompt
from jaxopt_llm.engine.sampling import MOST_SEED, SamplingParams
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.models import ModelConfig
from jaxopt_llm.text import Tokenizer


class Intake:
    """Makes the requests of one engine; any thread may ask it.

    Args:
      model: vocabulary and end-of-sequence tokens.
      tokenizer: for texts, or None.
      sizes: of the engine.
      reuse: look for prompts in the pages of others, where the request allows it.
    """

    def __init__(
        self, model: ModelConfig, tokenizer: Tokenizer | None, sizes: SchedulerConfig, *, reuse: bool
    ):
        self._model = dataclasses.replace(model, max_seq_len=sizes.max_seq_len)
        self._tokenizer, self._reuse = tokenizer, reuse
        self.stop_ids = frozenset(model.eos_ids) | (tokenizer.eos_ids if tokenizer else set())
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng()

    def encode(self, prompt: Prompt, *, room: int = 1) -> list[int]:
        """The token ids of a prompt: see `prompt.encode`."""
        return prompts.encode(prompt, self._tokenizer, self._model, room=room)

    def request(
        self,
        ids: list[int],
        params: SamplingParams | None,
        *,
        priority: int = 0,
        wanted: Wanted = Wanted(),
        allowed: Allowed | None = None,
    ) -> Generation:
        """A request, not yet under way; without `params` it generates nothing.

        Raises:
          ValueError: for settings that this model and tokenizer cannot follow.
        """
        settings = params or SamplingParams()
        _check_bias(settings, self._model.vocab_size)
        room, seed = self._model.max_seq_len - len(ids), settings.seed
        if seed is None:
            seed = int(self._seeds.integers(MOST_SEED, endpoint=True))
        request = Request(
            id=next(self._numbers),
            prompt=ids,
            max_tokens=min(settings.max_tokens, room) if params else 0,
            priority=priority,
            # What is wanted of every position must be computed; penalties count the tokens that are fed.
            reuse=self._reuse and wanted == Wanted() and not settings.penalizes,
            stepwise=allowed is not None,
        )
        return Generation(
            request,
            settings,
            seed=seed,
            stop_ids=frozenset() if settings.ignore_eos else self.stop_ids,
            tokenizer=self._tokenizer,
            start=time.perf_counter(),
            wanted=wanted,
            allowed=allowed,
        )


def _check_bias(params: SamplingParams, vocab_size: int) -> None:
    outside = [token for token in params.logit_bias or () if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"logit_bias names token {outside[0]}, outside the vocabulary of {vocab_size}")
