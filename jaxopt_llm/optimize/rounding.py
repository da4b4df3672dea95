"""The step that rounds a model layer by layer, by methods that look at a text."""

import dataclasses

from jaxopt_llm.calibrate import Method
from jaxopt_llm.kernels import quantization_format
from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Context
from jaxopt_llm.quantize import GPTQ, layerwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layerwise:
    """Rounds a model layer by layer, each seeing what the rounded ones before it give: see `jaxopt_llm.quantize`.

    Attributes:
      methods: each layer goes through all of them, such as `(AWQ(round=False), GPTQ())`.
      rest: format of what they leave floats: embedding, head and experts; None leaves those floats.
    """

    methods: tuple[Method, ...] = (GPTQ(),)
    rest: str | None = "int8"

    def __post_init__(self):
        if not self.methods:
            raise ValueError("methods is empty; give at least one, such as GPTQ()")
        if self.rest is not None:
            quantization_format(self.rest)

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        return layerwise(
            model,
            context.ids(),
            self.methods,
            rest=self.rest,
            directory=context.folder,
            progress=context.progress,
        )
