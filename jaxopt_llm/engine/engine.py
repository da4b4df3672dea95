"""The engine: requests in, tokens out, as fast as the device allows.

Whoever waits for a result runs it: see `driver`. The host stays one dispatch ahead: it plans and sends the next before
it reads the last.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxopt_llm.cache import keep_programs
from jaxopt_llm.engine import inputs
from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.drafting import Drafting, levels
from jaxopt_llm.engine.driver import Driver
from jaxopt_llm.engine.generation import Allowed, Generation, Wanted
from jaxopt_llm.engine.intake import Intake
from jaxopt_llm.engine.placed import devices_of
from jaxopt_llm.engine.plan import Metrics
from jaxopt_llm.engine.processes import Following, loop_over
from jaxopt_llm.engine.processors import check_processor
from jaxopt_llm.engine.program import Processor
from jaxopt_llm.engine.prompt import Prompt, Prompts, encode, several
from jaxopt_llm.engine.request import Result, Score
from jaxopt_llm.engine.runner import Runner
from jaxopt_llm.engine.sampling import SamplingParams
from jaxopt_llm.engine.stream import Stream
from jaxopt_llm.engine.timeline import Timeline, Watch
from jaxopt_llm.models import Transformer, num_stages
from jaxopt_llm.sharding.hosts import spanned
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
      processors: JAX functions `(logits [B, V], last tokens [B], positions [B]) -> logits`, before sampling; for any B.
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
        self._devices, count = devices_of(model), num_stages(model)
        if speculates and spanned(self._devices) > 1:
            raise ValueError(
                "drafts are for one process: how many pay is measured, and each of several would find another number; "
                "leave out draft and prompt_lookup"
            )
        keep_programs()
        self.model_config, self.tokenizer, self.config = model.config, tokenizer, config
        sizes = config.scheduler(model.config, stages=count)
        rooms = levels(config.draft_tokens) if speculates else (0,)
        rows = inputs.rows_of_logits(sizes, rooms)
        for processor in processors:
            check_processor(processor, rows, model.config.vocab_size)
        self._runner = Runner(model, config, processors, draft=draft, consume=consume)
        self._intake = Intake(model.config, tokenizer, sizes, reuse=config.prefix_cache)
        widths = inputs.Widths(sizes.max_slots, model.config.vocab_size, max(1, len(self._intake.stop_ids)))
        drafting = Drafting(config.draft_tokens, model=draft is not None) if speculates else None
        alike = (repr(config), f"jax {jax.__version__}")
        parts = (self._runner, sizes, widths, drafting)
        self._loop = loop_over(self._devices, alike, self._intake.request, *parts)
        self._driver = Driver(self._loop)

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
        asked = [self._ask(prompt, settings) for prompt, settings in zip(ids, each, strict=True)]
        self._run(asked, progress)
        return [generation.result() for generation in asked]

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),
        *,
        priority: int = 0,
        allowed: Allowed | None = None,
    ) -> Stream:
        """A prompt's text as it comes; returns at once, and its request runs as soon as anybody waits for anything.

        Args:
          prompt: one, as the function `generate` takes it.
          params: settings.
          priority: requests of a lower number go first.
          allowed: a function of the tokens so far that says which may come next, `bool[V]`, or None for all.
        """
        generation = self._ask(self.encode(prompt), params, priority=priority, allowed=allowed)
        stream = Stream(self._driver, generation)
        self._driver.add([generation])
        return stream

    def follow(self) -> None:
        """Does what the engine of process 0 is asked, until that process ends its work.

        For the others of several processes, where process 0 alone gets requests. Without it every process must ask its
        engine the same, as one program does.

        Raises:
          ValueError: in process 0, or where the model lies on devices of one process alone.
        """
        loop = self._loop
        if not isinstance(loop, Following):
            raise ValueError(
                "follow() is for the processes after the first, with a model spread over all of them; "
                "ask this engine itself"
            )
        loop.alone = True
        self._driver.wait(lambda: loop.over)

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
        return self._intake.encode(prompt, room=room)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the pages take for one token while every layer still sees it: scales, padding and the draft
        model's too."""
        return self._runner.kv_bytes_per_token

    @property
    def stages(self) -> int:
        """Of the pipeline that the model lies in; 1 where it lies in none."""
        return self._runner.stages

    @property
    def processes(self) -> int:
        """Over how many the model's devices are spread."""
        return spanned(self._devices)

    def metrics(self) -> Metrics:
        """Requests and pages at this moment, and programs so far."""
        return self._driver.call(self._loop.metrics)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Timeline]:
        """Records when each stage of the pipeline is at what, as long as the context is open; complete after it."""
        if self.processes > 1:
            raise ValueError(
                "what stages in other processes do cannot be watched; take a mesh in one process"
            )
        watch = Watch(self._runner.stages)
        self._driver.call(functools.partial(setattr, self._runner, "watch", watch))
        try:
            yield watch.timeline
        finally:
            self._driver.call(functools.partial(setattr, self._runner, "watch", None))
            watch.close()

    def update(self, model: Transformer) -> None:
        """Exchanges the weights for others of the same shapes, without a compilation; what is in flight ends first.

        Raises:
          ValueError: if the model is not of the same form, or requests are still under way.
        """
        self._driver.call(functools.partial(self._update, model))

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
        for done, shape in enumerate(shapes):
            if progress:
                progress(done, len(shapes))
            self._driver.call(functools.partial(self._loop.warm_up, shape))
        if progress:
            progress(len(shapes), len(shapes))
        return len(shapes)

    def _update(self, model: Transformer) -> None:
        self._loop.settle()
        if not self._loop.idle:
            raise ValueError(
                "requests are under way; wait for them, or cancel them, before the weights change"
            )
        self._runner.update(model)
        self._loop.forget_prefixes()

    def _ask(self, ids: list[int], params: SamplingParams | None, **wishes: Any) -> Generation:
        """A request that can run, as `Intake.request`; it does not yet."""
        generation = self._intake.request(ids, params, **wishes)
        self._loop.check(generation.request)
        return generation

    def _measure(self, prompts: Prompts, wanted: Wanted, progress: Progress | None) -> list[Generation]:
        """Runs prompts for what is wanted of them."""
        ids = [self.encode(prompt, room=0) for prompt in several(prompts)]
        asked = [self._ask(prompt, None, wanted=wanted) for prompt in ids]
        self._run(asked, progress)
        return asked

    def _run(self, generations: Sequence[Generation], progress: Progress | None) -> None:
        """All of them to their ends; if that is broken off, none is left behind."""
        report = progress or (lambda done, total: None)
        try:
            self._driver.add(generations)
            for done, generation in enumerate(generations):
                report(done, len(generations))
                self._driver.wait(functools.partial(_has_ended, generation))
        except BaseException:
            for generation in generations:
                self._driver.cancel(generation)
            raise
        report(len(generations), len(generations))


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
