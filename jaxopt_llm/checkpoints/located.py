"""A parameter as it lies in a checkpoint: read by rows of its leading dimension, in the model's own layout."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxopt_llm.checkpoints.blocks import NativeBlocks, native_form
from jaxopt_llm.checkpoints.files import CheckpointError, Tensor
from jaxopt_llm.kernels import Format
from jaxopt_llm.models import ParamSpec, mismatches

_MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
MXFP4 = np.concatenate([_MXFP4_VALUES, -_MXFP4_VALUES])  # OCP Microscaling Formats v1.0, section 5.3.3


@dataclasses.dataclass(frozen=True)
class Located:
    """Where a parameter is and how to read it.

    Attributes:
      shape: of its values, in the model's layout.
      read: `(first, last, dtype) -> values` of rows first..last of the leading dimension.
      native: `(first, last) -> codes and scales` as the file holds them, or None.
      form: what `native` gives.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int, Any], np.ndarray]
    native: Callable[[int, int], NativeBlocks] | None = None
    form: Format | None = None


def plain(tensor: Tensor) -> Located:
    """A tensor that lies as the model wants it."""
    form = _form(tensor)
    native = (lambda a, b: tensor.native((slice(a, b),))) if form else None
    return Located(tensor.shape, lambda a, b, dtype: tensor.read((slice(a, b),), dtype), native, form)


def _form(tensor: Tensor) -> Format | None:
    try:
        form = native_form(tensor.storage)
    except ValueError:
        return None
    return Format(
        bits=form.bits,
        group=form.group,
        scale_dtype=form.scale,
        offset="minimum" if form.bias else None,
        act=native_act(),
    )


def native_act() -> tuple[int, int] | None:
    """How activations meet GGUF's blocks: on a CPU rounded, as in llama.cpp, for integer products; else float."""
    return (8, 32) if jax.default_backend() == "cpu" else None


def stacked(experts: Sequence[Located]) -> Located:
    """One weight an expert, all of one shape and form."""
    count, rows = len(experts), experts[0].shape[0]

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        return np.stack([expert.read(0, rows, dtype) for expert in experts[first:last]])

    def native(first: int, last: int) -> NativeBlocks:
        blocks = [expert.native(0, rows) for expert in experts[first:last] if expert.native]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    form = experts[0].form
    return Located((count, *experts[0].shape), read, native if form else None, form)


def shifted(located: Located, offset: float) -> Located:
    """Stored as `value + offset`."""
    read = lambda a, b, dtype: (located.read(a, b, np.float32) - np.float32(offset)).astype(dtype)
    return Located(located.shape, read)


def unpermuted(located: Located, heads: int) -> Located:
    """Rows of queries or keys that GGUF interleaved for its rope: pairs (2j, 2j+1) go to (j, j + H/2)."""
    order = half_split_order(located.shape[0], heads)

    def rows(first: int, last: int) -> tuple[int, int, np.ndarray]:
        """The whole heads that hold these rows, and which of their rows are wanted."""
        width = located.shape[0] // heads
        start, stop = first // width * width, -(-last // width) * width
        return start, stop, order[first:last] - start

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        start, stop, wanted = rows(first, last)
        return located.read(start, stop, dtype)[wanted]

    def native(first: int, last: int) -> NativeBlocks:
        assert located.native
        start, stop, wanted = rows(first, last)
        data, scale, bias = located.native(start, stop)
        return NativeBlocks(data[wanted], scale[wanted], None if bias is None else bias[wanted])

    return dataclasses.replace(located, read=read, native=native if located.native else None)


def half_split_order(rows: int, heads: int) -> np.ndarray:
    """Which interleaved row stands at each half-split row."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def part_of(tensor: Tensor, part: tuple[int, int] | None, transposed: bool) -> Located:
    """Every `step`-th output of a tensor `[E, O]` or, transposed, `[E, I, O]`."""
    start, step = part or (0, 1)
    outputs = len(range(start, tensor.shape[-1 if transposed or len(tensor.shape) < 3 else -2], step))

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        values = tensor.read((slice(first, last),), dtype)
        return (values.swapaxes(-1, -2) if transposed else values)[:, start::step]

    inner = (tensor.shape[1],) if transposed else tensor.shape[2:]
    return Located((tensor.shape[0], outputs, *inner), read)


def mxfp4(blocks: Tensor, scales: Tensor, part: tuple[int, int] | None) -> Located:
    """Codes `[E, O, I/32, 16]`, two a byte, low half first, and a power of two (plus 127) for each 32."""
    start, step = part or (0, 1)
    experts, outputs, groups, _ = blocks.shape

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        codes = blocks.read((slice(first, last),))[:, start::step]
        exponents = scales.read((slice(first, last),))[:, start::step].astype(np.int32) - 127
        values = np.stack([MXFP4[codes & 15], MXFP4[codes >> 4]], axis=-1).reshape(*codes.shape[:-1], 32)
        return np.ldexp(values, exponents[..., None]).reshape(*codes.shape[:2], -1).astype(dtype)

    return Located((experts, len(range(start, outputs, step)), groups * 32), read)


def check(
    path: Any,
    wanted: Mapping[str, ParamSpec],
    located: Mapping[str, Located],
    sources: Mapping[str, str],
    left_over: Sequence[str],
) -> None:
    """Raises CheckpointError listing all missing, misshapen and unexpected tensors.

    Args:
      path: the checkpoint.
      wanted: every parameter of the model.
      located: those that were found.
      sources: the name in the file that each parameter goes by.
      left_over: tensors that nobody asked for.
    """
    found = {name: entry.shape for name, entry in located.items()}
    problems = [
        f"{problem} (tensor {sources[_parameter(problem)]!r})" for problem in mismatches(wanted, found)
    ]
    problems += [f"unexpected tensor {name!r}" for name in left_over]
    if problems:
        raise CheckpointError(path, problems)


def _parameter(problem: str) -> str:
    """The parameter that a line of `mismatches` speaks of."""
    first, second, *_ = problem.split(" ")
    return second if first == "missing" else first
