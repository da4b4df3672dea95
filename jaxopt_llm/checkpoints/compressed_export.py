"""Quantized weights to tensors and settings as compressed-tensors has them: see `compressed`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_llm.checkpoints.compressed import ACTIVATIONS, HALF, METHOD, ROWS, Scheme
from jaxopt_llm.checkpoints.files import TensorSpec
from jaxopt_llm.kernels import QArray
from jaxopt_llm.kernels.codes import pack_codes


def scheme_of(module: str, w: QArray) -> Scheme:
    """The scheme that says what a weight is, for this module alone.

    Raises:
      ValueError: if there is none; the message names the module.
    """
    group = None if w.scale.shape[-1] == 1 else w.group
    integers = w.bits in HALF and np.issubdtype(w.data.dtype, np.integer)
    rows = w.act == ROWS and w.bits == 8 and w.bias is None and group is None
    if not integers or not (w.act is None or rows) or w.shape[-1] % 8 or not _has_whole_zeros(w):
        raise ValueError(
            f"{module} is quantized in a form that compressed-tensors does not have; those it has are w8a8, int8, and "
            "int8 or int4 in groups, symmetric or from an integer zero, such as int4_g64_zero"
        )
    return Scheme(
        targets=(module,),
        format="int-quantized" if rows else "pack-quantized",  # as vLLM wants them
        bits=w.bits,
        group=group,
        symmetric=w.bias is None,
        act=w.act,
    )


def tensors(name: str, w: QArray, scheme: Scheme) -> list[TensorSpec]:
    """What stands for the weight of that name, `M.weight`."""
    outputs, inputs = w.shape
    scale = (f"{name}_scale", w.scale.shape, w.scale.dtype, functools.partial(np.asarray, w.scale))
    if scheme.format == "int-quantized":
        return [(name, w.shape, np.int8, functools.partial(np.asarray, w.data)), scale]
    per_word = 32 // w.bits
    found = [
        (f"{name}_packed", (outputs, inputs // per_word), np.int32, functools.partial(_packed, w)),
        (f"{name}_shape", (2,), np.int64, np.array(w.shape, np.int64)),
        scale,
    ]
    if w.bias is not None:
        shape = (-(-outputs // per_word), w.scale.shape[-1])
        found.append((f"{name}_zero_point", shape, np.int32, functools.partial(_packed_zeros, w)))
    return found


def settings(schemes: Sequence[Scheme], floats: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of modules, each in a scheme of its own, and of those that stay floats."""
    groups: dict[Scheme, list[str]] = {}
    for scheme in schemes:
        groups.setdefault(dataclasses.replace(scheme, targets=()), []).extend(scheme.targets)
    formats = {scheme.format for scheme in groups}
    several = len(formats) > 1
    return {
        "quant_method": METHOD,
        "format": "mixed-precision" if several else next(iter(formats)),
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": list(floats),
        "config_groups": {
            f"group_{number}": _group(scheme, ["Linear"] if len(groups) == 1 else modules)
            | ({"format": scheme.format} if several else {})
            for number, (scheme, modules) in enumerate(groups.items())
        },
    }


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    weights: Mapping[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }
    activations = ACTIVATIONS if scheme.act else None
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _packed(w: QArray) -> np.ndarray:
    raw = np.asarray(w.data).view(np.uint8)
    return (raw if w.bits == 4 and w.bias is not None else raw ^ HALF[w.bits]).view(np.int32)


def _packed_zeros(w: QArray) -> np.ndarray:
    codes = np.round(_zeros(w)).astype(np.int32) + (128 if w.bits == 8 else 0)
    rows = np.ascontiguousarray(np.pad(codes, ((0, -len(codes) % (32 // w.bits)), (0, 0))).T)
    raw = rows.astype(np.uint8) if w.bits == 8 else pack_codes(rows, w.bits)
    return np.ascontiguousarray(raw.view(np.int32).T)


def _zeros(w: QArray) -> np.ndarray:
    """Which code stands for 0, if it is a whole number; float32 `[O, groups]`."""
    scale, bias = (np.asarray(leaf).astype(np.float32) for leaf in (w.scale, w.bias))
    return -bias / np.where(scale == 0, np.float32(1), scale)


def _has_whole_zeros(w: QArray) -> bool:
    if w.bias is None:
        return True
    zeros, least = _zeros(w), -128 if w.bits == 8 else 0
    near = np.abs(zeros - np.round(zeros)) < 1e-3  # of a step: what rounding a bias to float16 leaves
    return bool((near & (zeros > least - 0.5) & (zeros < least + 2**w.bits - 0.5)).all())
