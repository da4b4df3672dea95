"""Logits processors: functions of the user that run inside the step."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxopt_llm.engine.program import Processor


def check_processor(processor: Processor, rows: Iterable[int], vocab_size: int) -> None:
    """Traces a processor at every size it will meet, so that a mistake shows before anything is generated.

    Args:
      processor: of the user.
      rows: of logits, in any of the engine's programs.
      vocab_size: V.

    Raises:
      ValueError: if it fails, or gives logits of another shape or dtype.
    """
    name = getattr(processor, "__name__", repr(processor))
    for count in rows:
        logits = jax.ShapeDtypeStruct((count, vocab_size), jnp.float32)
        ids = jax.ShapeDtypeStruct((count,), jnp.int32)
        try:
            result = jax.eval_shape(processor, logits, ids, ids)
        except Exception as error:
            raise ValueError(f"logits processor {name} fails for {count} rows: {error}") from error
        if not isinstance(result, jax.ShapeDtypeStruct) or (result.shape, result.dtype) != (
            logits.shape,
            logits.dtype,
        ):
            raise ValueError(f"logits processor {name} gives {result}; it must give {logits}")
