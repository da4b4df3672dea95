"""How the next token is chosen: settings of a request, and their arrays over slots."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_MASKED = -jnp.inf


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
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        rules = (
            ("max_tokens", 1, math.inf),
            ("temperature", 0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", math.ulp(0), 1),
            ("min_p", 0, 1),
            ("repetition_penalty", math.ulp(0), math.inf),
            ("presence_penalty", -math.inf, math.inf),
            ("frequency_penalty", -math.inf, math.inf),
            ("logprobs", 0, 100),
        )
        for name, low, high in rules:
            value = getattr(self, name)
            if value is None and name == "logprobs":
                continue
            if not math.isfinite(value) or not low <= value <= high:
                above = "more than 0" if low == math.ulp(0) else f"at least {low}"
                limit = f" and at most {high}" if math.isfinite(high) else ""
                raise ValueError(f"{name}={value} must be finite, {above}{limit}")
        if "" in self.stop:
            raise ValueError("stop strings must not be empty")

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
            top_k=column("top_k", jnp.int32),
            top_p=column("top_p", jnp.float32),
            min_p=column("min_p", jnp.float32),
            repetition=column("repetition_penalty", jnp.float32),
            presence=column("presence_penalty", jnp.float32),
            frequency=column("frequency_penalty", jnp.float32),
            keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
        )


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
