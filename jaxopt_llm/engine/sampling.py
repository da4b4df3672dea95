"""How the next token is chosen: settings of a request, and their arrays over slots."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

TOP = 20  # best tokens whose log-probabilities are reported
MOST_BIASES = 300  # tokens whose scores a request may shift
MOST_SEED = 2**32 - 1  # the noise has a key of 32 bits
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
    "seed": (Integral, 0, MOST_SEED, f"a whole number from 0 to {MOST_SEED}, or None to draw one"),
    "ignore_eos": (bool, False, True, "True or False"),
    "logprobs": (Integral, 0, TOP, f"a whole number from 0 to {TOP}, or None"),
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
      seed: below 2**32. Same seed, same tokens, whatever stands beside the request; None draws one.
      stop: strings that end the text; they are not part of it.
      ignore_eos: go on past end-of-sequence tokens.
      logprobs: None, or how many of the best tokens to report beside each one chosen, at most 20.
      logit_bias: token ids to what is added to their scores; at most 300.
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
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self):
        for name, (kind, low, high, words) in _RULES.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue
            if not is_a(kind, value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be {words}")
        object.__setattr__(self, "stop", _strings(self.stop))
        if self.logit_bias is not None:
            _check_biases(self.logit_bias)

    @property
    def needs_full(self) -> bool:
        """Whether only the step's full program does what is asked for."""
        return self.penalizes or bool(self.logit_bias) or self.logprobs is not None

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampling:
    """The settings of every row of a step, `[B]` each."""

    temperature: Float[Any, "B"]
    top_k: Int[Any, "B"]
    top_p: Float[Any, "B"]
    min_p: Float[Any, "B"]
    repetition_penalty: Float[Any, "B"]
    presence_penalty: Float[Any, "B"]
    frequency_penalty: Float[Any, "B"]
    seed: UInt32[Any, "B"]

    @classmethod
    def stack(cls, params: Sequence[SamplingParams], seeds: Sequence[int]) -> Self:
        """On the host. `seeds` are the requests' own, drawn where `SamplingParams.seed` is None."""
        column = lambda name: np.array([getattr(p, name) for p in params], np.float32)
        floats = {
            field.name: column(field.name)
            for field in dataclasses.fields(cls)
            if field.name not in ("top_k", "seed")
        }
        top_k = np.array([min(p.top_k, _TOP_K) for p in params], np.int32)
        return cls(**floats, top_k=top_k, seed=np.array(seeds, np.uint32))


def is_a(kind: type, value: Any) -> bool:
    """Whether a value is of a kind of number, `bool` being none but itself."""
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def _check_biases(biases: Any) -> None:
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias={biases!r} must be a mapping of token ids to numbers, or None")
    if len(biases) > MOST_BIASES:
        raise ValueError(f"logit_bias has {len(biases)} tokens; at most {MOST_BIASES}")
    for token, shift in biases.items():
        if not is_a(Integral, token) or not is_a(Real, shift) or not abs(shift) <= _LARGEST:
            raise ValueError(
                f"logit_bias={{{token!r}: {shift!r}}} must map token ids to finite float32 numbers"
            )


def _strings(stop: Any) -> tuple[str, ...]:
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"{stop=} must be a string or several, none of them empty")
    return strings


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], counts: Int[Array, "B V"], rows: RowSampling
) -> Float[Array, "B V"]:
    """Applies the three penalties.

    Args:
      logits: raw scores.
      seen: tokens of the prompt.
      counts: how often each token was generated.
      rows: settings.
    """
    repeated = seen | (counts > 0)
    factor = rows.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(repeated, scaled, logits)
    times = counts.astype(jnp.float32)
    return (
        logits
        - rows.presence_penalty[:, None] * jnp.minimum(times, 1)
        - rows.frequency_penalty[:, None] * times
    )


def sample(logits: Float[Array, "B V"], rows: RowSampling, positions: Int[Array, "B"]) -> Int[Array, "B"]:
    """One token a row: the best where the temperature is 0, else drawn from what the filters leave.

    The noise depends on a row's seed and position alone, so neighbours cannot change its tokens.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        key = lambda seed, position: jax.random.fold_in(jax.random.key(seed), position)
        keys = jax.vmap(key)(rows.seed, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[-1],)))(keys)
        drawn = jnp.argmax(keep_likely(scaled, rows) + noise, axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, best)

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: best)


def keep_likely(logits: Float[Array, "B V"], rows: RowSampling) -> Float[Array, "B V"]:
    """Scores of tokens outside top-k, then top-p, then min-p become -inf; the best token always stays."""
    filters = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    # A row without filters keeps even what is lost beside 1 in a sum of probabilities: its neighbours have no say.
    keep = lambda: jnp.where(filters[:, None], _keep_likely(logits, rows), logits)
    return jax.lax.cond(jnp.any(filters), keep, lambda: logits)


def _keep_likely(logits: Array, rows: RowSampling) -> Array:
    size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, size), size)[:, None]
    ranked = jnp.where(jnp.arange(size)[None, :] < count, ordered, _MASKED)
    probs = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # what stands ahead of each token
    kept = (before < rows.top_p[:, None]) & (probs >= rows.min_p[:, None] * probs[:, :1])
    kept = (kept & (ranked > _MASKED)).at[:, 0].set(True)
    floor = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= floor, logits, _MASKED)
