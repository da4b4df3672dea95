"""How far a student's predictions lie from its teacher's: nats a token, from logits, in their own dtype.

No function here sees more than the block of tokens it is given: `blocks` walks a sequence.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_kl")


class TopK(NamedTuple):
    """What is kept of a teacher's prediction: its k likeliest tokens, and the share of all others together.

    Attributes:
      ids: of the tokens.
      logprobs: their log-probabilities.
      tail: the log-probability of any other token.
    """

    ids: Int[Any, "*T k"]
    logprobs: Float[Any, "*T k"]
    tail: Float[Any, "*T"]


def kl(logp: Float[Array, "*T V"], logq: Float[Array, "*T V"]) -> Float[Array, "*T"]:
    """KL(P || Q) of log-probabilities."""
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def mixed(logp: Float[Array, "*T V"], logq: Float[Array, "*T V"], share: float) -> Float[Array, "*T V"]:
    """Log-probabilities of `share * P + (1 - share) * Q`, for a share between 0 and 1.

    The mean is of probabilities: one of log-probabilities would be another distribution, and no JSD.
    """
    return jnp.logaddexp(logp + math.log(share), logq + math.log1p(-share))


def jsd(
    teacher: Float[Array, "*T V"], student: Float[Array, "*T V"], beta: float = 0.5
) -> Float[Array, "*T"]:
    """The generalised Jensen-Shannon divergence of logits (GKD, arXiv:2306.13649, equation 1).

    `beta * KL(P_T || M) + (1 - beta) * KL(P_S || M)` with `M = beta * P_T + (1 - beta) * P_S`. At its ends, where that
    is 0, stand the limits of its slope: beta = 0 is KL(P_T || P_S), beta = 1 is KL(P_S || P_T).
    """
    logp, logq = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    if beta == 0:
        return kl(logp, logq)
    if beta == 1:
        return kl(logq, logp)
    middle = mixed(logp, logq, beta)
    return beta * kl(logp, middle) + (1 - beta) * kl(logq, middle)


def skewed_kl(
    teacher: Float[Array, "*T V"], student: Float[Array, "*T V"], alpha: float = 0.1
) -> Float[Array, "*T"]:
    """KL(P_T || alpha * P_T + (1 - alpha) * P_S) of logits (DistiLLM, arXiv:2402.03898, equation 3)."""
    logp, logq = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return kl(logp, mixed(logp, logq, alpha) if alpha else logq)


def cross_entropy(student: Float[Array, "*T V"], targets: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """The negative log-likelihood of the token that follows."""
    chosen = jnp.take_along_axis(student, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(student, axis=-1) - chosen


def top_k(teacher: Float[Array, "T V"], k: int) -> TopK:
    """What to keep of a teacher's logits."""
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), k)
    return TopK(ids, logprobs, _without(teacher, ids) - jax.nn.logsumexp(teacher, axis=-1))


def top_k_kl(teacher: TopK, student: Float[Array, "T V"]) -> Float[Array, "T"]:
    """KL(P_T || P_S) with all tokens but the teacher's likeliest taken as one.

    Without that last one it would be no divergence: a student could lower it below 0.
    """
    total = jax.nn.logsumexp(student, axis=-1)
    known = jnp.take_along_axis(student, teacher.ids, axis=-1) - total[..., None]
    unknown = _without(student, teacher.ids) - total
    return kl(teacher.logprobs, known) + jnp.exp(teacher.tail) * (teacher.tail - unknown)


def _without(logits: Array, ids: Array) -> Array:
    """The logarithm of the sum over all tokens but these; exact where 1 minus the others' share would round to 0.

    Where these are all, it is the least number there is: of an infinite one, 0 times it would be no number.
    """
    rows = jnp.arange(logits.shape[0], dtype=ids.dtype)[:, None]
    return jax.nn.logsumexp(logits.at[rows, ids].set(jnp.finfo(logits.dtype).min), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What a student learns from.

    Attributes:
      divergence: from the teacher, one of `DIVERGENCES`.
      beta: of `jsd`.
      alpha: of `skewed_kl`.
      temperature: divides both models' logits; the divergence is multiplied by its square, so that gradients keep
        their size (arXiv:1503.02531, section 2).
      cross_entropy: share of the text's own next token in the loss; the rest is the divergence. At 1 the teacher's
        predictions have no part: what is left of it is text, if it wrote any.
      hidden: weight of the distance between hidden states, as shares of the teacher's own size, beside that.
    """

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl"] = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence!r} must be one of {', '.join(DIVERGENCES)}")
        for name in ("beta", "cross_entropy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if not 0 <= self.alpha < 1:
            raise ValueError(
                f"alpha={self.alpha} must be at least 0 and below 1: at 1 nothing is left of the student"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not 0 <= self.hidden < math.inf:
            raise ValueError(f"hidden={self.hidden} must not be negative")

    @property
    def compares_logits(self) -> bool:
        return self.cross_entropy < 1

    def distance(
        self, teacher: Float[Array, "T V"] | TopK, student: Float[Array, "T V"]
    ) -> Float[Array, "T"]:
        """The divergence, a value a token."""
        if isinstance(teacher, TopK):
            return top_k_kl(teacher, student)
        teacher, student = teacher / self.temperature, student / self.temperature
        match self.divergence:
            case "skewed_kl":
                found = skewed_kl(teacher, student, self.alpha)
            case "jsd":
                found = jsd(teacher, student, self.beta)
            case name:
                found = jsd(teacher, student, float(name == "reverse_kl"))
        return found * self.temperature**2
