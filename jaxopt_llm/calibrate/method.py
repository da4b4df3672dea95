"""`Method`: what changes a layer, as a pair of pure functions."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxopt_llm.calibrate.statistics import Statistics, Wants
from jaxopt_llm.kernels import Weight
from jaxopt_llm.models import ModelConfig

LayerWeights = Mapping[str, Weight]
"""The parameters of a layer by their names in it: `attention.q.weight`, `mlp_norm.weight`."""


@runtime_checkable
class Method(Protocol):
    """What changes a model a layer at a time: a frozen dataclass of its settings.

    A layer is changed once for each of its `wants`, in their order, and each of them sees the layer as the
    ones before it left it: to quantize o with what the quantized q, k and v give, want first theirs and then its.
    """

    def wants(self, config: ModelConfig, layer: int) -> Sequence[Wants]:
        """What is to be known of this layer, a pass over the text each."""

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> LayerWeights:
        """The layer's weights after what was wanted is known, those that stay as they are among them or not.

        Args:
          config: of the model.
          layer: which one.
          weights: all of the layer, its norms among them.
          statistics: of the products that one of `wants` names, and of no others.
        """
