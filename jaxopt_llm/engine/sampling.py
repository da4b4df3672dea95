"""How the next token is chosen: settings of a request, and their arrays over slots."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_MASKED = -jnp.inf
_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_TOP_K = 2**31 - 1  # as an int32; more than any vocabulary has

# What each setting may be: its kind, least and largest value, and all that in words. None only where it is the default.
_RULES: dict[str, tuple[type, float, float, str]] = {
    "max_tokens": (Integral, 1, math.inf, "a whole number of at least 1"),
    "temperature": (Real, 0, _LARGEST, "a finite float32 of at least 0"),
    "top_k": (Integral, 0, math.inf, "a whole number of at least 0; 0 keeps every token"),
    "top_p": (Real, _SMALLEST, 1, "a number above 0 and at most 1; 1 keeps every token"),
    "min_p": (Real, 0, 1, "a number from 0 to 1; 0 keeps every token"),
    "repetition_penalty": (Real, _SMALLEST, _LARGEST, "a finite float32 above 0; 1 changes nothing"),
    "presence_penalty": (Real, -_LARGEST, _LARGEST, "a finite float32; 0 changes nothing"),
    "frequency_penalty": (Real, -_LARGEST, _LARGEST, "a finite float32; 0 changes nothing"),
    "seed": (Integral, -math.inf, math.inf, "a whole number, or None to draw one"),
    "ignore_eos": (bool, False, True, "True or False"),
    "logprobs": (Integral, 0, 100, "a whole number from 0 to 100, or None"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for.

    Attributes:
      max_tokens: most tokens to generate; generation also ends at the model's context.
      temperature: logits are divided by it; 0 takes the best token.
      top_k: only the k best tokens; 0 for all.
      top_p: only the fewest best tokens whose probabilities sum to p (arXiv:1904.09751).
      min_p: only tokens with at least this share of the best one's probability (arXiv:2407.01082).
      repetition_penalty: scores of tokens in prompt and output are divided by it, negative ones
        multiplied (arXiv:1909.05858).
      presence_penalty, frequency_penalty: subtracted from scores of tokens in the output, once, and a time.
      seed: same seed, same tokens, whatever stands beside the request; None draws one.
      stop: strings that end the text; they are not part of it.
      ignore_eos: go on past end-of-sequence tokens.
      logprobs: None, or how many of the best tokens to report beside each one chosen.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        for name, (kind, low, high, words) in _RULES.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            if not fits or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be {words}")
        object.__setattr__(self, "stop", _strings(self.stop))

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotSampling:
    """The settings of every slot, `[R]` each."""

    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]
    keys: Key[Array, "R"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> Self:
        column = lambda name, dtype: jnp.asarray([getattr(p, name) for p in params], dtype)
        draw = np.random.default_rng()
        seeds = [draw.integers(2**32) if p.seed is None else p.seed % 2**32 for p in params]
        return cls(
            temperature=column("temperature", jnp.float32),
            top_k=jnp.asarray([min(p.top_k, _TOP_K) for p in params], jnp.int32),
            top_p=column("top_p", jnp.float32),
            min_p=column("min_p", jnp.float32),
            repetition=column("repetition_penalty", jnp.float32),
            presence=column("presence_penalty", jnp.float32),
            frequency=column("frequency_penalty", jnp.float32),
            keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
        )


def _strings(stop: Any) -> tuple[str, ...]:
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"{stop=} must be a string or several, none of them empty")
    return strings


def penalize(
    logits: Float[Array, "R V"], seen: Bool[Array, "R V"], counts: Int[Array, "R V"], slots: SlotSampling
) -> Float[Array, "R V"]:
    """Applies the three penalties.

    Args:
      logits: raw scores.
      seen: tokens of the prompt.
      counts: how often each token was generated.
      slots: settings.
    """
    repeated = seen | (counts > 0)
    factor = slots.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(repeated, scaled, logits)
    times = counts.astype(jnp.float32)
    return logits - slots.presence[:, None] * jnp.minimum(times, 1) - slots.frequency[:, None] * times


def sample(logits: Float[Array, "R V"], slots: SlotSampling, positions: Int[Array, "R"]) -> Int[Array, "R"]:
    """One token a slot: the best where the temperature is 0, else drawn from what the filters leave.

    The noise depends on a slot's seed and position alone, so neighbours cannot change its tokens.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.where(slots.temperature > 0, slots.temperature, 1)[:, None]
        keys = jax.vmap(jax.random.fold_in)(slots.keys, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[-1],)))(keys)
        drawn = jnp.argmax(keep_likely(scaled, slots) + noise, axis=-1).astype(jnp.int32)
        return jnp.where(slots.temperature > 0, drawn, best)

    return jax.lax.cond(jnp.any(slots.temperature > 0), draw, lambda: best)


def keep_likely(logits: Float[Array, "R V"], slots: SlotSampling) -> Float[Array, "R V"]:
    """Scores of tokens outside top-k, then top-p, then min-p become -inf; the best token always stays."""
    filters = (slots.top_k > 0) | (slots.top_p < 1) | (slots.min_p > 0)
    return jax.lax.cond(jnp.any(filters), lambda: _keep_likely(logits, slots), lambda: logits)


def _keep_likely(logits: Array, slots: SlotSampling) -> Array:
    size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(slots.top_k > 0, jnp.minimum(slots.top_k, size), size)[:, None]
    ranked = jnp.where(jnp.arange(size)[None, :] < count, ordered, _MASKED)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # what stands ahead of each token
    kept = (before < slots.top_p[:, None]) & (probs >= slots.min_p[:, None] * probs[:, :1])
    kept = (kept & (ranked > _MASKED)).at[:, 0].set(True)
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, _MASKED)
