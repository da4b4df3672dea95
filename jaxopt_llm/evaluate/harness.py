"""A model as lm-evaluation-harness asks it: log-likelihoods and generations, through the engine.

It needs the extra `eval`; the rest of `evaluate` does not.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxopt_llm.engine import Engine, SamplingParams

Progress = Callable[[str, int, int], None]
Pair = tuple[Any, list[int], list[int]]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MAX_TOKENS = 256  # where a task does not say: the harness's own default


class EngineLM(TemplateLM):
    """An engine as the harness's `LM`; all requests of one kind go to it at once, and it batches them.

    Text becomes tokens as with the harness's own Hugging Face models: with the tokens that the tokenizer puts around
    every text, and an empty context is the BOS, or else the EOS.

    Args:
      engine: with a tokenizer.
      progress: called with (stage, requests done, of all).

    Raises:
      ValueError: for an engine without a tokenizer, or a tokenizer without BOS and EOS.
    """

    def __init__(self, engine: Engine, *, progress: Progress | None = None):
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("tasks are text, and the engine has no tokenizer; give it one")
        self._engine, self._words = engine, engine.tokenizer
        self._context = engine.config.max_seq_len or engine.model_config.max_seq_len
        self._report = progress or (lambda stage, done, total: None)
        ends = sorted(self._words.eos_ids | set(engine.model_config.eos_ids))
        self._marks = [mark for mark in (*ends, self._words.bos_id) if mark is not None]
        if not self._marks:
            raise ValueError(
                "the tokenizer has neither a BOS nor an EOS token, so that nothing can come first"
            )

    @property
    def max_length(self) -> int:
        """Tokens before the last one that is predicted, which the harness does not count and the engine does."""
        return self._context - 1

    @property
    def eot_token_id(self) -> int:
        return self._marks[0]

    @property
    def prefix_token_id(self) -> int:
        return self._marks[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; unless told, with special tokens around a text that does not begin with the BOS."""
        if add_special_tokens is None:
            bos = self._words.special_tokens.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self._words.encode(string, add_special=add_special_tokens, parse_special=True)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats, in windows that predict each token once."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        scores = iter(self._loglikelihood_tokens([pair for pairs in windows for pair in pairs]))
        totals = [sum(next(scores)[0] for _ in pairs) for pairs in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, which is not part of them, or the end of the sequence.

        They are as they follow the context. The harness's Hugging Face models decode them alone, which with
        SentencePiece loses a space at the beginning.
        """
        asked = [request.args for request in requests]
        params = [_sampling(settings) for _, settings in asked]
        prompts = [self._prompt(text, p.max_tokens) for (text, _), p in zip(asked, params, strict=True)]
        results = self._engine.generate(prompts, params, progress=self._stage("generating"))
        for given, result in zip(asked, results, strict=True):
            _check(result.error)
            self.cache_hook.add_partial("generate_until", given, result.text)
        return [result.text for result in results]

    @property
    def tokenizer_name(self) -> str:
        """Changes with the tokenizer: the harness keys its cache of requests by it."""
        return hashlib.sha256(self._words.backend.to_str().encode()).hexdigest()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of a name, True for the default one; None where none is wanted."""
        if not chat_template:
            return None
        name = "default" if chat_template is True else chat_template
        if name not in self._words.chat_templates:
            raise ValueError(
                f"the tokenizer has no {name} chat template (it has {sorted(self._words.chat_templates)}); "
                "ask the model without one"
            )
        return self._words.chat_templates[name]

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text; without a generation prompt it breaks off where the last message does."""
        text = self._words.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        end = text.rfind(last)
        if end < 0:
            raise ValueError(f"the chat template does not write the last message, {last!r}, as it is")
        return text[: end + len(last)]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **unused: Any) -> list[tuple[float, bool]]:
        """Log-likelihood, nats, of each continuation after its context, and whether greedy decoding gives it."""
        self._check_lengths(requests)
        rows = [(context + continuation)[-self._context :] for _, context, continuation in requests]
        scores = self._engine.score(rows, progress=self._stage("scoring"))
        answers = []
        for (key, _, tail), score in zip(requests, scores, strict=True):
            _check(score.error)
            start = len(score.logprobs) - len(tail)
            answer = (float(score.logprobs[start:].sum(dtype="float64")), bool(score.greedy[start:].all()))
            answers.append(answer)
            if key is not None:  # a part of a rolling request has none
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _check_lengths(self, requests: Sequence[Pair]) -> None:
        longest = max((len(tail) for _, _, tail in requests), default=0)
        if longest >= self._context:
            raise ValueError(
                f"a text of {longest} tokens is to be predicted within a context of {self._context}; "
                "give the engine a longer one"
            )
        cut = sum(len(head) + len(tail) > self._context for _, head, tail in requests)
        if cut:
            warnings.warn(
                f"{cut} of {len(requests)} requests are longer than the context of {self._context}; "
                "their beginnings were cut off",
                stacklevel=2,
            )

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _prompt(self, text: str, max_tokens: int) -> list[int]:
        room = self._context - max_tokens
        if room < 1:
            raise ValueError(f"{max_tokens=} leave no room for a prompt in a context of {self._context}")
        return self.tok_encode(text)[-room:] or [self.prefix_token_id]

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(name, done, total)


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs`; one that the engine does not know is an error, as it would change results."""
    known: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), _MAX_TOKENS))
    del known["do_sample"]  # `temperature` says it
    stop, max_tokens = filter(None, known.pop("until")), known.pop("max_gen_toks")
    for name in known:
        if name not in _SAMPLING:
            raise ValueError(f"generation_kwargs has {name!r}, which must be one of {', '.join(_SAMPLING)}")
    return SamplingParams(max_tokens=max_tokens, stop=tuple(stop), **known)


def _check(error: str | None) -> None:
    if error:
        raise ValueError(f"a request failed: {error}")
