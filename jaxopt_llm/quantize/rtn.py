"""Rounding to nearest."""

from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import Transformer, quantizable, weights, with_weights


def quantize(model: Transformer, format: str) -> Transformer:
    """A copy of a model with every matrix rounded to nearest, embedding and head included.

    Args:
      model: with float weights; those already quantized are rounded from the values they stand for.
      format: `int8`, one scale an output channel, activations float: the form TPUs and GPUs run fast.
        `int8_block`, a float16 scale every 32 features, activations rounded likewise on the fly (GGUF's
        Q8_0): the form CPUs run fast. `int4`, a float16 scale and minimum every 32 features, activations as in
        `int8_block` (GGUF's Q4_1): 5 bits a parameter.

    Raises:
      ValueError: for an unknown format, or a width that its groups do not divide; the message names the weight.
    """
    chosen = quantization_format(format)
    rounded = {}
    for name, value in weights(model).items():
        if quantizable(name, value.shape):
            chosen.check(value.shape[-1], name)
            floats = value.dequantize() if isinstance(value, QArray) else value
            rounded[name] = chosen.quantize(floats)
    return with_weights(model, rounded)
