"""How large an engine is."""

import dataclasses
from numbers import Integral
from typing import Self

import jax.numpy as jnp

from jaxopt_llm.engine.sampling import is_a
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.models import ModelConfig

_SIZES = ("max_slots", "page_size", "max_tokens_per_step", "decode_steps", "draft_tokens")
_SIZES_OR_NONE = ("max_seq_len", "cache_tokens")
_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_MOST_SLOTS, _SHORTEST = 16, 64  # of a `fitting` engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      max_slots: sequences that run together.
      max_seq_len: longest sequence, prompt and output, tokens; None for the model's context.
      cache_tokens: tokens of keys and values that the pages hold, over all sequences; None for as many as
        `max_slots` sequences need, at most 8,192 or one of `max_seq_len`.
      page_size: tokens a page.
      max_tokens_per_step: tokens fed in one step at most; longer prompts go in chunks.
      decode_steps: steps of decoding a dispatch when nothing waits; one on a pipeline.
      prefix_cache: share the pages of equal prefixes.
      prompt_lookup: draft tokens from where the latest ones stood before (speculative decoding without a draft model).
      draft_tokens: drafted at a time at most, by prompt lookup or a draft model; fewer where fewer pay.
      cache_dtype: name of the dtype of keys and values; None for the model's own. int8 has a scale a token and head.
    """

    max_slots: int = 8
    max_seq_len: int | None = None
    cache_tokens: int | None = None
    page_size: int = 16
    max_tokens_per_step: int = 512
    decode_steps: int = 8
    prefix_cache: bool = True
    prompt_lookup: bool = False
    draft_tokens: int = 7
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_SIZES_OR_NONE):
            value = getattr(self, name)
            if value is None and name in _SIZES_OR_NONE:
                continue
            if not is_a(Integral, value) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in ("prefix_cache", "prompt_lookup"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.cache_dtype not in (None, *_CACHE_DTYPES):
            raise ValueError(f"cache_dtype={self.cache_dtype!r} must be one of {', '.join(_CACHE_DTYPES)}")

    @classmethod
    def fitting(cls, model: ModelConfig, *, requests: int, tokens: int) -> Self:
        """Just large enough for so many requests of so many tokens each, at most 16 at once.

        Sizes are powers of two, so that similar calls share their programs.
        """
        max_slots = min(_MOST_SLOTS, power_of_two(requests))
        max_seq_len = min(model.max_seq_len, max(_SHORTEST, power_of_two(tokens)))
        return cls(max_slots=max_slots, max_seq_len=max_seq_len, cache_tokens=max_slots * max_seq_len)

    def scheduler(self, model: ModelConfig, *, stages: int = 1) -> SchedulerConfig:
        """What this means for a model, and for the stages of a pipeline that it may lie in.

        Raises:
          ValueError: if `max_seq_len` is beyond the model's context.
        """
        context = self.max_seq_len or model.max_seq_len
        if context > model.max_seq_len:
            raise ValueError(f"max_seq_len={context} is beyond the model's context of {model.max_seq_len}")
        wanted = self.cache_tokens or max(context, min(self.max_slots * context, 8192))
        pages = lambda tokens: -(-tokens // self.page_size)
        # A window that starts and ends inside a page reaches one page further, and so does the chunk behind it.
        seen = lambda window: pages(window + self.max_tokens_per_step) + 2
        windows = model.window_kinds
        counts = [
            pages(wanted) if w is None else min(pages(wanted), self.max_slots * seen(w)) for w in windows
        ]
        return SchedulerConfig(
            max_slots=self.max_slots,
            page_size=self.page_size,
            num_pages=tuple(counts),
            windows=windows,
            max_tokens_per_step=max(self.max_tokens_per_step, self.max_slots),
            max_seq_len=context,
            decode_steps=self.decode_steps if stages == 1 else 1,
            stages=stages,
        )

    def kv_dtype(self, model_dtype: jnp.dtype) -> jnp.dtype:
        """Dtype of keys and values."""
        return jnp.dtype(self.cache_dtype or model_dtype)


def power_of_two(at_least: int) -> int:
    """The next of 1, 2, 4, ..."""
    return 1 << max(0, at_least - 1).bit_length()
