"""A model as a step program takes it: what it is made of is static, its parameters are flat leaves."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from jaxopt_llm.models import Transformer


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its parameters. Its hash takes milliseconds, so it is computed once.

    Attributes:
      graph: the modules.
      treedef: how flat parameters go back into them.
    """

    graph: nnx.GraphDef
    treedef: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.graph, self.treedef)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @classmethod
    def split(cls, model: Transformer) -> tuple["Skeleton", tuple[Array, ...]]:
        """A model as its skeleton and its parameters as flat leaves."""
        graph, params = nnx.split(model)
        leaves, treedef = jax.tree.flatten(params)
        return cls(graph, treedef), tuple(leaves)

    def fill(self, leaves: tuple[Array, ...]) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, leaves))
