"""The factor of inverse second moments that GPTQ and SparseGPT lean on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_DAMPING = 1.0


def inverse_factor(gram: Float[Array, "I I"], damping: float = 0.01) -> Float[Array, "I I"]:
    """The upper triangular `U` with `U.T @ U = inv(gram + d)`, `d` a share of the diagonal's mean on the diagonal.

    A feature that was never seen counts as if it were alone.

    Args:
      gram: second moments, `X.T @ X`.
      damping: the share, above 0 and at most 1; ten times as much where there is no factor, up to 1
        (arXiv:2210.17323, section 3.3).

    Raises:
      ValueError: if there is none even then: the second moments are no numbers; or for another damping.
    """
    if not 0 < damping <= MOST_DAMPING:
        raise ValueError(f"{damping=} must be above 0 and at most {MOST_DAMPING}")
    while True:
        factor = _factor(gram, damping)
        if bool(jnp.isfinite(factor).all()):
            return factor
        if damping == MOST_DAMPING:
            raise ValueError(
                f"second moments cannot be factorised even with {damping=}: they hold no numbers"
            )
        damping = min(10 * damping, MOST_DAMPING)


@jax.jit
def _factor(gram: Float[Array, "I I"], damping: Float[Array, ""] | float) -> Float[Array, "I I"]:
    """From one factorisation: backwards, a Cholesky factor is `R` in `gram = R @ R.T`, upper, and `U = inv(R)`."""
    diagonal = jnp.diagonal(gram)
    alone = jnp.where(diagonal == 0, 1.0, 0.0)
    damped = gram + jnp.diag(alone + damping * diagonal.mean())
    backwards = jnp.linalg.cholesky(damped[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(backwards, jnp.eye(len(gram)), lower=True)
    return inverse[::-1, ::-1]
