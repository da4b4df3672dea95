"""A whole model by methods that look at a text."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxopt_llm.calibrate import Method, walk
from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import Transformer, quantizable, weights
from jaxopt_llm.quantize.rtn import quantize
from jaxopt_llm.quantize.rules import check_rules, exact_rules


def layerwise(
    model: Transformer,
    ids: Int[np.ndarray, "N T"],
    methods: Sequence[Method],
    *,
    rest: str | None = "int8",
    directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """A copy of a model whose layers went through methods, layer by layer, and what they leave floats to nearest.

    Args:
      model: with float weights; those already quantized are rounded from the values they stand for.
      ids: the calibration text, N sequences of T tokens.
      methods: such as `[GPTQ()]`, or `[AWQ(round=False), GPTQ()]`: each layer goes through all of them.
      rest: format of embedding, head and experts; None leaves them floats.
      directory: where finished layers are kept: what was interrupted goes on after the last of them.
      progress: called with (layers done, of all).

    Raises:
      ValueError: as `calibrate.walk`, for an unknown format, or a width that groups do not divide.
    """
    check_rules([(".*", rest)])
    changed = walk(model, ids, methods, directory=directory, progress=progress)
    left = {
        name: rest
        for name, value in weights(changed).items()
        if rest is not None and not isinstance(value, QArray) and quantizable(name, value.shape)
    }
    return quantize(changed, None, rules=exact_rules(left))
