"""Mixed precision: a format for each matrix, by what rounding it was measured to cost, within a budget of bytes."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxopt_llm.calibrate import LayerWeights, Statistics, Wants
from jaxopt_llm.kernels import QArray, quantization_format
from jaxopt_llm.models import ModelConfig, Transformer, flat_params, num_params, specs, weights
from jaxopt_llm.quantize.gptq import GPTQ
from jaxopt_llm.quantize.layerwise import layerwise
from jaxopt_llm.quantize.rtn import quantize
from jaxopt_llm.quantize.rules import exact_rules
from jaxopt_llm.quantize.sensitivity import Losses, Progress, sensitivities

MIXED = ("int3_g64_zero", "int4_g64_zero", "int4_g32_zero", "int8_g64")
"""Formats of 3.5, 4.5, 5 and 8.25 bits."""


class _Choice(NamedTuple):
    nbytes: int
    loss: float
    format: str


def mixed(
    model: Transformer,
    ids: Int[np.ndarray, "N T"],
    *,
    target_bits: float = 5.0,
    formats: Sequence[str] = MIXED,
    sequences: int = 4,
    gptq: GPTQ | None = GPTQ(),
    path: Path | None = None,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """A copy of a model, each matrix rounded in the format that `allocate` gives it.

    Args:
      model: with float weights.
      ids: the calibration text, N sequences of T tokens.
      target_bits: of everything that is stored, over the parameters.
      formats: to choose from.
      sequences: the first so many are what `sensitivities` measures on.
      gptq: how the layers' products are rounded, each in its own format in place of this one's, seeing all of the text;
        None rounds to nearest, as embedding, head and experts always are.
      path: of the file that keeps what was measured, so that another budget needs no new pass.
      directory: where finished layers are kept (see `calibrate.walk`).
      progress: called with (figures measured and layers rounded, of all).

    Raises:
      ValueError: as `sensitivities`, `allocate` and `layerwise`.
    """
    layers = model.config.num_layers if gptq else 0
    tell = progress or (lambda done, total: None)
    losses = sensitivities(
        model, ids[:sequences], formats, path=path, progress=lambda done, total: tell(done, total + layers)
    )
    chosen = allocate(model, losses, target_bits=target_bits)
    if gptq:
        figures = sum(map(len, losses.values()))
        model = layerwise(
            model,
            ids,
            [_Allocated(gptq=gptq, formats=tuple(sorted(chosen.items())))],
            rest=None,
            directory=directory,
            progress=lambda done, total: tell(figures + done, figures + total),
        )
    left = {
        name: chosen[name]
        for name, value in weights(model).items()
        if name in chosen and not isinstance(value, QArray)
    }
    return quantize(model, None, rules=exact_rules(left))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Allocated:
    """GPTQ in a format of each matrix's own."""

    gptq: GPTQ
    formats: tuple[tuple[str, str], ...]

    def wants(self, config: ModelConfig, layer: int) -> tuple[Wants, ...]:
        return self.gptq.wants(config, layer)

    def apply(
        self, config: ModelConfig, layer: int, weights: LayerWeights, statistics: Mapping[str, Statistics]
    ) -> dict[str, QArray]:
        formats = dict(self.formats)
        rounded: dict[str, QArray] = {}
        for product, found in statistics.items():
            own = dataclasses.replace(self.gptq, format=formats[f"layers.{layer}.{product}.weight"])
            rounded |= own.apply(config, layer, weights, {product: found})
        return rounded


def allocate(model: Transformer, losses: Losses, *, target_bits: float) -> dict[str, str]:
    """The format of each matrix: the least sum of losses within the budget.

    Greedy along the lower convex hulls of loss over bytes: all matrices begin at their smallest format, and the step
    that gains most a byte goes first. That is the Lagrangian optimum (Shoham and Gersho 1988) at every budget that it
    reaches exactly; what is left is filled with the next best steps that still fit.

    Args:
      model: which the losses are of; it may be abstract.
      losses: as `sensitivities` measures them; matrices that are not among them stay as they are.
      target_bits: of everything that is stored, scales, embedding, norms and head included, over the parameters.

    Raises:
      ValueError: if the smallest formats do not fit the budget.
    """
    shapes = {name: spec.shape for name, spec in specs(model).items()}
    hulls = {
        name: _hull(_Choice(_nbytes(format, shapes[name]), loss, format) for format, loss in own.items())
        for name, own in losses.items()
    }
    stay = {name: param.get_value() for name, param in flat_params(model).items() if name not in losses}
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    taken = sum(map(size, jax.tree.leaves(stay))) + sum(hull[0].nbytes for hull in hulls.values())
    budget = target_bits * num_params(model) / 8
    if taken > budget:
        raise ValueError(
            f"{target_bits=} is less than the {8 * taken / num_params(model):.2f} bits that the smallest formats take; "
            "raise it, or add smaller formats"
        )
    chosen = {name: hull[0] for name, hull in hulls.items()}
    steps = [(name, *step) for name, hull in hulls.items() for step in itertools.pairwise(hull)]
    for name, smaller, larger in sorted(steps, key=lambda step: -_gain(*step[1:])):
        more = larger.nbytes - smaller.nbytes
        if (
            chosen[name] == smaller and taken + more <= budget
        ):  # else an earlier step of this matrix did not fit
            chosen[name], taken = larger, taken + more
    return {name: choice.format for name, choice in chosen.items()}


def _nbytes(format: str, shape: Sequence[int]) -> int:
    leaves = jax.tree.leaves(quantization_format(format).shapes(tuple(shape)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _hull(choices: Iterable[_Choice]) -> list[_Choice]:
    """Those that some price of a byte makes best, from the smallest up; each step gains less a byte than the last."""
    hull: list[_Choice] = []
    for choice in sorted(choices):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(smaller: _Choice, larger: _Choice) -> float:
    """What a byte more takes off the loss."""
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)
