"""The engine: requests in, tokens out, as fast as the device allows.

Whoever waits for a result drives the engine, under one lock: there is no thread to start, to stop or to lose. The
host stays one dispatch ahead: it plans and sends the next before it reads the last.
"""

import asyncio
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxopt_llm.cache import keep_programs
from jaxopt_llm.engine import inputs
from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.drafting import Drafting
from jaxopt_llm.engine.generation import Allowed, Generation, Wanted
from jaxopt_llm.engine.loop import Loop
from jaxopt_llm.engine.plan import Metrics, Request
from jaxopt_llm.engine.program import Processor
from jaxopt_llm.engine.prompt import Prompt, Prompts, encode, several
from jaxopt_llm.engine.request import Chunk, Result, Score
from jaxopt_llm.engine.runner import Runner
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer

Progress = Callable[[int, int], None]


def generate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    processors: Sequence[Processor] = (),
    **settings: Any,
) -> list[Result]:
    """Continues prompts; each gives what it gives alone, whatever stands beside it.

    Args:
      model: any model, quantized, on a mesh or neither.
      tokenizer: may be None where prompts are token ids and no text is wanted.
      prompts: one or several of: a string, taken as it is; a list of messages
        (`{"role": ..., "content": ...}`), which goes through the chat template; a list of token ids.
      params: settings for all prompts, or one for each.
      processors: JAX functions `(logits [R, V], last tokens [R], positions [R]) -> logits`, before sampling.
      **settings: `SamplingParams` fields, in place of `params`.

    Returns:
      a `Result` for each prompt, in order.

    Raises:
      ValueError: for an empty prompt, one longer than the model's context, or bad settings.
    """
    if params is not None and settings:
        raise ValueError(f"give params or {', '.join(settings)}, not both")
    chosen = SamplingParams(**settings) if params is None else params
    ids = [encode(prompt, tokenizer, model.config) for prompt in several(prompts)]
    output = max(
        [p.max_tokens for p in ([chosen] if isinstance(chosen, SamplingParams) else chosen)], default=0
    )
    longest = max(map(len, ids), default=0) + output
    config = EngineConfig.fitting(model.config, requests=len(ids), tokens=longest)
    return Engine(model, tokenizer, config, processors=processors).generate(ids, chosen)


class Engine:
    """A model ready to run requests: paged cache, continuous batching, programs compiled as they are needed.

    Making one has JAX keep compiled programs on disk from then on: see `cache.keep_programs`.

    Args:
      model: any model, quantized or not.
      tokenizer: may be None where prompts are token ids and no text is wanted.
      config: sizes.
      processors: JAX functions `(logits [B, V], last tokens [B], positions [B]) -> logits`, before sampling.
      draft: a smaller model with the same tokenizer, on the same devices, whose guesses the model verifies several at
        a time: the tokens stay the same and come sooner where it guesses well. Requests that only the full program
        serves (penalties, log-probabilities, masks, biases) do without.
      consume: the models' arrays are deleted once they are packed for the kernels, so that no weight is there twice;
        the models are of no more use.

    Raises:
      ValueError: for sizes that do not fit the model, a processor that fails or changes the logits' shape, or a draft
        model that does not suit the model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig = EngineConfig(),
        *,
        processors: Sequence[Processor] = (),
        draft: Transformer | None = None,
        consume: bool = False,
    ):
        if draft is not None and config.prompt_lookup:
            raise ValueError("give a draft model or prompt_lookup=True, not both")
        speculates = config.prompt_lookup or draft is not None
        if speculates and config.decode_steps == 1:
            raise ValueError("decode_steps=1 leaves no room for drafts; take at least 2")
        keep_programs()
        self.model_config, self.tokenizer, self.config = model.config, tokenizer, config
        for processor in processors:
            _check(processor, model.config.vocab_size)
        sizes = config.scheduler(model.config)
        self._runner = Runner(model, config, processors, draft=draft, consume=consume)
        self._stop_ids = frozenset(model.config.eos_ids) | (tokenizer.eos_ids if tokenizer else set())
        widths = inputs.Widths(sizes.max_slots, model.config.vocab_size, max(1, len(self._stop_ids)))
        drafting = Drafting(config.draft_tokens, model=draft is not None) if speculates else None
        self._loop = Loop(self._runner, sizes, widths, drafting)
        self._numbers = itertools.count()
        self._seeds = np.random.default_rng()
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        *,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Continues prompts, as many at once as there are slots; results in order.

        Args:
          prompts: one or several, as the function `generate` takes them.
          params: for all, or one for each.
          progress: called with (prompts done, of all).
        """
        ids = [self.encode(prompt) for prompt in several(prompts)]
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(ids):
            raise ValueError(f"{len(each)} params for {len(ids)} prompts; give one, or one for each")
        asked = self._ask_all(
            [(prompt, settings, Wanted()) for prompt, settings in zip(ids, each, strict=True)]
        )
        self._finish_all(asked, progress)
        return [generation.result() for generation in asked]

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        *,
        priority: int = 0,
        allowed: Allowed | None = None,
    ) -> "Stream":
        """A prompt's text as it comes.

        Args:
          prompt: one, as the function `generate` takes it.
          params: settings.
          priority: requests of a lower number go first.
          allowed: a function of the tokens so far that says which may come next, `bool[V]`, or None for all.
        """
        with self._lock:
            generation = self._ask(self.encode(prompt), params, priority=priority, allowed=allowed)
        return Stream(self, generation)

    def score(self, prompts: Prompts, *, progress: Progress | None = None) -> list[Score]:
        """The log-probability of every token of each prompt after its first; a prompt may fail alone."""
        return [_score(asked) for asked in self._measure(prompts, Wanted(scores=True), progress)]

    def embed(self, prompts: Prompts, *, progress: Progress | None = None) -> Float[np.ndarray, "n D"]:
        """The mean of the last hidden states of each prompt's tokens, float32.

        A row is NaN where the model gave no numbers for its prompt.
        """
        asked = self._measure(prompts, Wanted(hidden=True), progress)
        rows = np.full((len(asked), self.model_config.d_model), np.nan, np.float32)
        for row, generation in zip(rows, asked, strict=True):
            if not generation.error:
                row[:] = np.concatenate(generation.hidden).mean(0)
        return rows

    def encode(self, prompt: Prompt, *, room: int = 1) -> list[int]:
        """The token ids of a prompt.

        Args:
          prompt: one, as the function `generate` takes it.
          room: tokens that must still fit after it.

        Raises:
          ValueError: if it is empty, too long, has an id outside the vocabulary, or needs a tokenizer that is missing.
        """
        config = dataclasses.replace(self.model_config, max_seq_len=self._loop.sizes.max_seq_len)
        return encode(prompt, self.tokenizer, config, room=room)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the pages take for one token while every layer still sees it: scales, padding and the draft
        model's too."""
        return self._runner.kv_bytes_per_token

    def metrics(self) -> Metrics:
        """Requests and pages at this moment, and programs so far."""
        with self._lock:
            return self._loop.metrics()

    def update(self, model: Transformer) -> None:
        """Exchanges the weights for others of the same shapes, without a compilation; what is in flight ends first.

        Raises:
          ValueError: if the model is not of the same form, or requests are still under way.
        """
        with self._lock:
            self._loop.settle()
            if not self._loop.idle:
                raise ValueError("requests are under way; wait for them before the weights change")
            self._runner.update(model)
            self._loop.forget_prefixes()

    def warm_up(
        self,
        *,
        prompt_tokens: int | None = None,
        rows: int | None = None,
        full: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Compiles programs ahead, so that no request waits for one; how many.

        Args:
          prompt_tokens: only what a prompt of this length takes; None for all lengths.
          rows: only what so many requests take that decode together; None for any number.
          full: with every optional part, else without any.
          progress: called with (programs compiled, of all).
        """
        shapes = inputs.shapes(self._loop.sizes, prompt_tokens=prompt_tokens, rows=rows, full=full)
        with self._lock:
            for done, shape in enumerate(shapes):
                if progress:
                    progress(done, len(shapes))
                self._loop.warm_up(shape)
        if progress:
            progress(len(shapes), len(shapes))
        return len(shapes)

    def _ask_all(self, asked: Sequence[tuple[list[int], SamplingParams | None, Wanted]]) -> list[Generation]:
        """All or none: a mistake in one leaves nothing behind."""
        generations: list[Generation] = []
        with self._lock:
            try:
                for ids, params, wanted in asked:
                    generations.append(self._ask(ids, params, wanted=wanted))
            except BaseException:
                self.cancel(generations)
                raise
        return generations

    def _ask(
        self,
        ids: list[int],
        params: SamplingParams | None,
        *,
        priority: int = 0,
        wanted: Wanted = Wanted(),
        allowed: Allowed | None = None,
    ) -> Generation:
        """Takes a request in; without `params` it generates nothing."""
        room = self._loop.sizes.max_seq_len - len(ids)
        settings = params or SamplingParams()
        number = next(self._numbers)
        request = Request(
            id=number,
            prompt=ids,
            max_tokens=min(settings.max_tokens, room) if params else 0,
            priority=priority,
            # What is wanted of every position must be computed; penalties count the tokens that are fed.
            reuse=self.config.prefix_cache and wanted == Wanted() and not settings.penalizes,
            stepwise=allowed is not None,
        )
        generation = Generation(
            request,
            settings,
            seed=int(self._seeds.integers(2**32)) if settings.seed is None else settings.seed,
            stop_ids=frozenset() if settings.ignore_eos else self._stop_ids,
            tokenizer=self.tokenizer,
            start=time.perf_counter(),
            wanted=wanted,
            allowed=allowed,
        )
        _check_bias(settings, self.model_config.vocab_size)
        self._loop.add(generation)
        return generation

    def _finish_all(self, generations: Sequence[Generation], progress: Progress | None) -> None:
        report = progress or (lambda done, total: None)
        try:
            for done, generation in enumerate(generations):
                report(done, len(generations))
                self.drive(functools.partial(_has_ended, generation))
        except BaseException:
            self.cancel(generations)
            raise
        report(len(generations), len(generations))

    def _measure(self, prompts: Prompts, wanted: Wanted, progress: Progress | None) -> list[Generation]:
        """Runs prompts for what is wanted of them."""
        ids = [self.encode(prompt, room=0) for prompt in several(prompts)]
        asked = self._ask_all([(prompt, None, wanted) for prompt in ids])
        self._finish_all(asked, progress)
        return asked

    def cancel(self, generations: Sequence[Generation]) -> None:
        with self._lock:
            for generation in generations:
                generation.end("cancelled")
                self._loop.close(generation)

    def drive(self, ready: Callable[[], bool]) -> None:
        """Runs steps until what the caller waits for is there."""
        while not ready():
            with self._lock:
                if not ready():
                    self._loop.advance()


class Stream:
    """What one request gives, as it comes: an iterator of `Chunk`s, for `for` and for `async for`.

    Each has new text; the last has the result. Iterating runs the engine.
    """

    def __init__(self, engine: Engine, generation: Generation):
        self._engine, self._generation = engine, generation
        self._done = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._done:
            raise StopIteration
        generation = self._generation
        self._engine.drive(lambda: generation.has_news or generation.ended)
        if generation.ended:
            self._done = True
            return Chunk(generation.fresh_text(), generation.result())
        return Chunk(generation.fresh_text())

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await asyncio.to_thread(next, self, None)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.to_thread(self.result).__await__()

    def result(self) -> Result:
        """Waits for the end."""
        self._engine.drive(functools.partial(_has_ended, self._generation))
        return self._generation.result()

    def cancel(self) -> None:
        """Ends the request where it is; nothing happens if it has ended."""
        self._engine.cancel([self._generation])


def _has_ended(generation: Generation) -> bool:
    return generation.ended


def _score(generation: Generation) -> Score:
    prompt = [] if generation.error else generation.request.prompt[1:]
    pairs = generation.scores[: len(prompt)]
    return Score(
        logprobs=np.array([logprob for logprob, _ in pairs], np.float32),
        greedy=np.array([best for _, best in pairs], np.int32) == np.array(prompt, np.int32),
        error=generation.error,
    )


def _check_bias(params: SamplingParams, vocab_size: int) -> None:
    outside = [token for token in params.logit_bias or () if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"logit_bias names token {outside[0]}, outside the vocabulary of {vocab_size}")


def _check(processor: Processor, vocab_size: int) -> None:
    """Traces a processor once, so that a mistake shows before anything is generated."""
    logits = jax.ShapeDtypeStruct((1, vocab_size), jnp.float32)
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    name = getattr(processor, "__name__", repr(processor))
    try:
        result = jax.eval_shape(processor, logits, ids, ids)
    except Exception as error:
        raise ValueError(f"logits processor {name} fails: {error}") from error
    if not isinstance(result, jax.ShapeDtypeStruct) or (result.shape, result.dtype) != (
        logits.shape,
        logits.dtype,
    ):
        raise ValueError(f"logits processor {name} gives {result}; it must give {logits}")
