"""Rounding to nearest."""

from jaxopt_llm.kernels import QArray
from jaxopt_llm.models import Transformer, weights, with_weights
from jaxopt_llm.quantize.rules import Rules, assign


def quantize(model: Transformer, format: str | None = "int8", *, rules: Rules = ()) -> Transformer:
    """A copy of a model with its matrices rounded to nearest, embedding and head included.

    Args:
      model: with float weights; those already quantized are rounded from the values they stand for.
      format: of every matrix that no rule names; None leaves those as they are. `int8`, one scale an output channel,
        activations float: the form TPUs and GPUs run fast. `w8a8` rounds activations too, one scale a row.
        `int8_block`, a float16 scale every 32 features, activations rounded likewise on the fly (GGUF's Q8_0): the
        form CPUs run fast. `int4`, a float16 scale and minimum every 32 features, activations as in `int8_block`
        (GGUF's Q4_1): 5 bits a parameter. `fp8`, an 8-bit float, one scale a channel. `int{8,4,3}_g{32,64,128}`,
        symmetric, in groups of so many features, or with `_zero` from an integer zero, with `_min` from a float
        minimum; activations float.
      rules: `(pattern, format)` pairs; the first pattern found in a matrix's name decides, and "float" or None as its
        format leaves floats: `[("head|embed", "int8"), (r"layers\\.0\\.", None)]`.

    Raises:
      ValueError: for an unknown format, a rule that decides nothing, or a width that groups do not divide; the message
        names the weight.
    """
    values = weights(model)
    rounded = {}
    for name, chosen in assign(model, format, rules).items():
        value = values[name]
        rounded[name] = chosen.quantize(value.dequantize() if isinstance(value, QArray) else value)
    return with_weights(model, rounded)
