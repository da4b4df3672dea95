"""The generator: prompts in, text out. One prefill, then several decode steps a dispatch."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxopt_llm.engine.prompt import Prompt, Prompts, encode, several
from jaxopt_llm.engine.request import Chunk, Result, TokenLogprob
from jaxopt_llm.engine.sampling import SamplingParams, SlotSampling
from jaxopt_llm.engine.step import PAGE_SIZE, Out, Processor, Program, Skeleton, State, decode, prefill
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Detokenizer, Tokenizer

_SLOTS = 16  # sequences that run together
_STEPS = 8  # decode steps a dispatch


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
        (`{"role": ..., "content": ...}`), which goes through the chat template; a list or array of token ids.
      params: settings for all prompts, or one for each.
      processors: JAX functions `(logits [R, V], last tokens [R], positions [R]) -> logits`, before sampling.
      **settings: `SamplingParams` fields, in place of `params`.

    Returns:
      a `Result` for each prompt, in order.

    Raises:
      ValueError: for an empty prompt, one of mixed parts or longer than the context, or bad settings.
    """
    if params is not None and settings:
        raise ValueError(f"give params or {', '.join(settings)}, not both")
    chosen = SamplingParams(**settings) if params is None else params
    return Generator(model, tokenizer, processors=processors).generate(prompts, chosen)


class Generator:
    """A model ready to generate: its parameters as flat leaves, its programs compiled as they are needed."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, processors: Sequence[Processor] = ()
    ):
        self.config, self.tokenizer = model.config, tokenizer
        graph, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)
        self._leaves, self._skeleton = tuple(leaves), Skeleton(graph, treedef)
        self._processors = tuple(processors)
        for processor in self._processors:
            _check(processor, model.config.vocab_size)

    def generate(self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams]) -> list[Result]:
        """As the function `generate`."""
        start = time.perf_counter()
        ids = [self.encode(prompt) for prompt in several(prompts)]
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(ids):
            raise ValueError(f"{len(each)} params for {len(ids)} prompts; give one, or one for each")
        active = [_Active(i, p, self, start) for i, p in zip(ids, each, strict=True)]
        for first in range(0, len(active), _SLOTS):
            for _ in self._run(active[first : first + _SLOTS]):
                pass
        return [request.result() for request in active]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Chunk]:
        """Pieces of text as they come; the last chunk has the result."""
        request = _Active(self.encode(prompt), params, self, time.perf_counter())
        for _ in self._run([request]):
            text = request.fresh_text()
            if text:
                yield Chunk(text)
        yield Chunk(request.fresh_text(), request.result())

    def warm_up(self, prompt: Prompt, params: SamplingParams) -> None:
        """Compiles what `stream(prompt, params)` runs, by its prefill and its first few decode steps."""
        request = _Active(self.encode(prompt), params, self, time.perf_counter())
        for _ in itertools.islice(self._run([request]), 2):
            pass

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; `ValueError` for one that this model cannot continue."""
        return encode(prompt, self.tokenizer, self.config)

    def _run(self, requests: Sequence["_Active"]) -> Iterator[None]:
        """Runs requests side by side to their ends; yields whenever there may be something new."""
        rows = 1 << (len(requests) - 1).bit_length()
        length = _bucket(max(len(request.prompt) for request in requests))
        total = max(len(request.prompt) + request.left for request in requests)
        settings = [request.params for request in requests]
        program = self._program(_bucket(max(total, length)), settings)
        idle = rows - len(requests)
        tokens = np.zeros((rows, length), np.int32)
        for row, request in zip(tokens, requests, strict=False):
            row[: len(request.prompt)] = request.prompt
        lengths = np.array([len(request.prompt) for request in requests] + [0] * idle, np.int32)
        slots = SlotSampling.stack([*settings, *[SamplingParams()] * idle])
        out, state = prefill(self._leaves, tokens, lengths, slots, program=program)
        self._collect(requests, jax.tree.map(lambda a: a[None], out))
        yield
        yield from self._decode(requests, state, slots, program, rows)

    def _decode(
        self, requests: Sequence["_Active"], state: State, slots: SlotSampling, program: Program, rows: int
    ) -> Iterator[None]:
        stop_ids = self._stop_ids(requests, rows)
        while any(request.left for request in requests):
            left = np.zeros(rows, np.int32)
            left[: len(requests)] = [request.left for request in requests]
            out, state = decode(self._leaves, state, slots, stop_ids, left, program=program, steps=_STEPS)
            self._collect(requests, out)
            yield

    def _program(self, tokens: int, settings: Sequence[SamplingParams]) -> Program:
        asked = [p.logprobs for p in settings if p.logprobs is not None]
        return Program(
            skeleton=self._skeleton,
            pages=-(-tokens // PAGE_SIZE),
            penalties=any(p.penalizes for p in settings),
            logprobs=max(asked) if asked else None,
            processors=self._processors,
        )

    def _stop_ids(self, requests: Sequence["_Active"], rows: int) -> np.ndarray:
        width = max(4, *(len(request.stop_ids) for request in requests))  # one program for most models
        ids = np.full((rows, width), -1, np.int32)
        for row, request in zip(ids, requests, strict=False):
            row[: len(request.stop_ids)] = sorted(request.stop_ids)
        return ids

    def _collect(self, requests: Sequence["_Active"], out: Out) -> None:
        """Gives each request its new tokens `[n, R]`."""
        out = jax.device_get(out)
        now = time.perf_counter()
        for slot, request in enumerate(requests):
            for i in range(len(out.tokens)):
                if request.left:
                    request.add(out, i, slot, now)


class _Active:
    """A request under way."""

    def __init__(self, prompt: list[int], params: SamplingParams, owner: Generator, start: float):
        self.prompt, self.params, self.start = prompt, params, start
        self.left = min(params.max_tokens, owner.config.max_seq_len - len(prompt))
        known = set(owner.config.eos_ids) | (owner.tokenizer.eos_ids if owner.tokenizer else set())
        self.stop_ids = frozenset() if params.ignore_eos else frozenset(known)
        if params.stop and owner.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._text = (
            Detokenizer(owner.tokenizer, prompt=prompt, stop=params.stop) if owner.tokenizer else None
        )
        self._pieces: list[str] = []
        self._shown = 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason = "length"
        self.first = self.last = start

    def add(self, out: Out, step: int, slot: int, now: float) -> None:
        token = int(out.tokens[step, slot])
        if not self.tokens:
            self.first = now
        self.last = now
        self.tokens.append(token)
        self.left -= 1
        if self.params.logprobs is not None:
            self.logprobs.append(_logprob(out, step, slot, self.params.logprobs))
        ended = token in self.stop_ids
        if self._text is not None:
            self._pieces.append("" if ended else self._text.add([token]))
            ended = ended or self._text.stopped is not None
            if ended or not self.left:
                self._pieces.append(self._text.flush())
        if ended:
            self.left, self.finish_reason = 0, "stop"

    def fresh_text(self) -> str:
        """Text since the last call."""
        text = "".join(self._pieces[self._shown :])
        self._shown = len(self._pieces)
        return text

    def result(self) -> Result:
        later = len(self.tokens) - 1
        return Result(
            text="".join(self._pieces),
            token_ids=self.tokens,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            logprobs=None if self.params.logprobs is None else self.logprobs,
            ttft_ms=(self.first - self.start) * 1e3,
            tpot_ms=(self.last - self.first) * 1e3 / later if later > 0 else None,
        )


def _logprob(out: Out, step: int, slot: int, count: int) -> TokenLogprob:
    assert out.logprob is not None and out.top_ids is not None and out.top_logprobs is not None
    ids, values = out.top_ids[step, slot][:count], out.top_logprobs[step, slot][:count]
    top = tuple((int(i), float(v)) for i, v in zip(ids, values, strict=True))
    return TokenLogprob(int(out.tokens[step, slot]), float(out.logprob[step, slot]), top)


def _bucket(tokens: int) -> int:
    """The next of 32, 48, 64, 96, 128, ...: few shapes, and at most a third of one is padding."""
    size = 32
    while size < tokens:
        size *= 2
    return size * 3 // 4 if size > 32 and size * 3 // 4 >= tokens else size


def _check(processor: Processor, vocab_size: int) -> None:
    """Traces a processor once, so that a mistake shows before anything is generated."""
    logits = jax.ShapeDtypeStruct((1, vocab_size), jnp.float32)
    ids = jax.ShapeDtypeStruct((1,), jnp.int32)
    name = getattr(processor, "__name__", repr(processor))
    try:
        result = jax.eval_shape(processor, logits, ids, ids)
    except Exception as error:
        raise ValueError(f"logits processor {name} fails: {error}") from error
    is_array = isinstance(result, jax.ShapeDtypeStruct)
    if not is_array or (result.shape, result.dtype) != (logits.shape, logits.dtype):
        raise ValueError(f"logits processor {name} gives {result}; it must give {logits}")
