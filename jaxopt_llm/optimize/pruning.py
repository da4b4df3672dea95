"""The steps that take parts out of a model, or make its weights zeros."""

import dataclasses
from pathlib import Path
from typing import get_args

from jaxopt_llm import prune
from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Context
from jaxopt_llm.prune import Axis, Depth, Importance, Shape, SparseMethod, Sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
    """Leaves a smaller dense model of the parts that matter most: see `jaxopt_llm.prune`.

    Attributes:
      target_params: share of the parameters outside embedding and head that stays; None where `shape` says it all.
      shape: sizes of the result; those it leaves open stay as they are.
      axes: what may be cut to reach `target_params`: mlp, heads, embed, layers.
      multiple: divides the feed-forward channels and the model width.
      depth: which layers go: those of least influence, a block of neighbours, or by perplexity.
      reconstruct: whether what stays is fitted to make up for the heads and channels that go.
      importance: file of scores, read where it is there, else measured and written: another size needs no new pass.
    """

    target_params: float | None = None
    shape: Shape = Shape()
    axes: tuple[Axis, ...] = ("mlp", "heads")
    multiple: int = 8
    depth: Depth = "influence"
    reconstruct: bool = True
    importance: Path | None = None

    def __post_init__(self):
        if (self.target_params is None) == (self.shape == Shape()):
            raise ValueError(
                f"target_params={self.target_params} and shape={self.shape}: give one of them, and one alone"
            )
        if self.target_params is not None and not 0 < self.target_params < 1:
            raise ValueError(
                f"target_params={self.target_params} must lie between 0 and 1: the share that stays"
            )
        if self.multiple < 1:
            raise ValueError(f"multiple={self.multiple} must be at least 1")

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        shape = self._shape_of(model)
        kept = prune.choose(self._scores(model, context), model.config, shape, depth=self.depth)
        if self.reconstruct:
            return prune.reconstruct(model, kept, context.ids(), progress=context.progress)
        return prune.cut(model, kept)

    def _shape_of(self, model: Transformer) -> Shape:
        if self.target_params is not None:
            return prune.fit(model, self.target_params, axes=self.axes, multiple=self.multiple)
        self.shape.resolve(model.config, self.multiple)
        return self.shape

    def _scores(self, model: Transformer, context: Context) -> Importance:
        if self.importance is not None and self.importance.exists():
            return Importance.load(self.importance)
        scores = prune.importance(
            model, context.ids(), without_layers=self.depth == "perplexity", progress=context.progress
        )
        if self.importance is not None:
            scores.save(self.importance)
        return scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Makes weights of the layers zero where they lie: see `jaxopt_llm.prune.sparsify`. Saves neither bytes nor time.

    Attributes:
      method: `magnitude`, `wanda` or `sparsegpt`.
      sparsity: share of zeros, or how many of each group stay, such as `2:4`.
    """

    method: SparseMethod = "sparsegpt"
    sparsity: float | str = 0.5

    def __post_init__(self):
        Sparsity.parse(self.sparsity)
        if self.method not in get_args(SparseMethod):
            raise ValueError(f"method={self.method!r} must be one of {', '.join(get_args(SparseMethod))}")

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        ids = context.ids() if self.method in prune.CALIBRATED else None
        return prune.sparsify(
            model, self.sparsity, self.method, ids=ids, directory=context.folder, progress=context.progress
        )
