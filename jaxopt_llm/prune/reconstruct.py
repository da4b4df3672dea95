"""What stays of a layer makes up for what goes: the products that read the cut axes are fitted anew."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxopt_llm.calibrate import LayerWeights, Statistics, Wants, walk
from jaxopt_llm.models import ModelConfig, Transformer
from jaxopt_llm.prune.surgery import Kept, cut, float_weights


def reconstruct(
    model: Transformer,
    kept: Kept,
    ids: Int[np.ndarray, "N T"],
    *,
    damping: float = 0.01,
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """`cut`, after `o` and `down` have learnt to say with what stays what they said with all of it.

    Each is the least-squares solution on a text, after that of the layers before it: the closed form that SparseGPT
    (arXiv:2301.00774) approximates, for whole columns, as ZipLM (arXiv:2302.04089) has it. Layers and the model width
    are cut as they are.

    Args:
      model: with float weights and no experts.
      kept: what stays.
      ids: calibration text, N sequences of T tokens.
      damping: share of the second moments' mean diagonal that is added to it.
      directory: where finished layers are kept, so that an interrupted run goes on (see `calibrate.walk`).
      progress: called with (layers done, of all).

    Raises:
      ValueError: as `cut` and `calibrate.walk`.
    """
    float_weights(model)
    shallow = cut(model, Kept(layers=kept.layers))
    cut(
        shallow, rest := dataclasses.replace(kept, layers=None)
    )  # refuses what does not fit before the long part
    method = _Reconstruct(
        heads=_tuples(kept.heads), mlp=_tuples(kept.mlp), head_dim=model.config.head_dim, damping=damping
    )
    return cut(walk(shallow, ids, [method], directory=directory, progress=progress), rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reconstruct:
    """As `Kept`, of a model whose layers all stay; first `o`, then `down`, which sees what the new `o` gives."""

    heads: tuple[tuple[int, ...], ...] | None
    mlp: tuple[tuple[int, ...], ...] | None
    head_dim: int
    damping: float

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return tuple(
            Wants(products=(product,), gram=True)
            for product, rows in (("attention.o", self.heads), ("mlp.down", self.mlp))
            if rows is not None
        )

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, Array]:
        changed = {}
        for product, seen in statistics.items():
            w, name = weights[f"{product}.weight"], f"{product}.weight"
            assert isinstance(w, Array) and seen.gram is not None, "checked, and wanted"
            columns = self._columns(product, layer)
            changed[name] = least_squares(w.astype(jnp.float32), seen.gram, columns, self.damping).astype(
                w.dtype
            )
        return changed

    def _columns(self, product: str, layer: int) -> Int[np.ndarray, "K"]:
        if product == "mlp.down":
            assert self.mlp is not None
            return np.asarray(self.mlp[layer])
        assert self.heads is not None
        first = np.asarray(self.heads[layer])[:, None] * self.head_dim
        return (first + np.arange(self.head_dim)).reshape(-1)


@jax.jit
def least_squares(
    w: Float[Array, "O I"],
    gram: Float[Array, "I I"],
    kept: Int[Array, "K"],
    damping: Float[Array, ""] | float,
) -> Float[Array, "O I"]:
    """The matrix with columns other than `kept` zero whose product with the inputs is nearest to `w`'s.

    `V[:, K] = W @ G[:, K] @ inv(G[K, K] + d)`, `d` a share of the diagonal's mean. The damping pulls towards the
    columns of `w` as they are, not towards zero.

    Args:
      w: float32.
      gram: second moments of the inputs, `X.T @ X`.
      kept: columns that stay.
      damping: the share.
    """
    ridge = damping * jnp.diagonal(gram).mean()
    inner = gram[kept][:, kept] + ridge * jnp.eye(len(kept))
    exact = jax.lax.Precision.HIGHEST
    aim = jnp.matmul(w, gram[:, kept], precision=exact) + ridge * w[:, kept]
    solved = jax.scipy.linalg.solve(inner, aim.T, assume_a="pos").T
    return jnp.zeros_like(w).at[:, kept].set(solved)


def _tuples(rows: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...] | None:
    return None if rows is None else tuple(tuple(map(int, row)) for row in rows)
