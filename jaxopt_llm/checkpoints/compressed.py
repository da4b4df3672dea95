"""Weights as compressed-tensors keeps them, which llm-compressor writes and vLLM reads.

Beside `M.weight_scale` `[O, groups]` a module M has either `M.weight`, int8 (int-quantized), or `M.weight_packed` and
`M.weight_shape` (pack-quantized): codes in int32, half their range added, the first in the lowest bits. An integer zero
is `M.weight_zero_point`, packed likewise down the rows. Source: github.com/vllm-project/compressed-tensors.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxopt_llm.checkpoints.blocks import NativeBlocks
from jaxopt_llm.checkpoints.files import Tensor
from jaxopt_llm.checkpoints.located import Located
from jaxopt_llm.kernels import Format, QArray
from jaxopt_llm.kernels.codes import unpack_codes
from jaxopt_llm.kernels.qarray import Act

METHOD, KEY = "compressed-tensors", "quantization_config"
HALF = {
    8: 0x80,
    4: 0x88,
}  # what turns codes from 0 up into two's complement, and back; of two nibbles at once
ROWS: Act = (8, None)
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the modules of a group are quantized.

    Attributes:
      targets: "Linear" for all, names of modules, or regular expressions after "re:".
      format: int-quantized or pack-quantized.
      bits: of a weight's code, 8 or 4.
      group: inputs that share a scale; None for one scale an output.
      symmetric: whether there is no zero point.
      act: rounding of activations, as `QArray.act`.
    """

    targets: tuple[str, ...]
    format: Literal["int-quantized", "pack-quantized"]
    bits: int
    group: int | None
    symmetric: bool
    act: Act | None

    def covers(self, module: str) -> bool:
        """Whether this is the scheme of a module of that name."""
        return any(
            re.match(target.removeprefix("re:"), module)
            if target.startswith("re:")
            else target in ("Linear", module)
            for target in self.targets
        )


def schemes(values: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a config.json; none where it is not of this kind.

    Raises:
      ValueError: for a setting that would change the results and that we do not know.
    """
    config = values.get(KEY)
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        return ()
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if config.get(key) and config[key] != {"format": "dense"}:
            raise ValueError(f"config.json has {KEY}.{key}={config[key]!r}, which is not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(
            f"config.json has {KEY} without config_groups; {METHOD} presets by name are not supported"
        )
    return tuple(_scheme(group, group.get("format") or config.get("format")) for group in groups.values())


def _scheme(group: Mapping[str, Any], format: Any) -> Scheme:
    weights: dict[str, Any] = group.get("weights") or {}
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    known = (
        (format == "pack-quantized" and bits in HALF) or (format == "int-quantized" and bits == 8),
        weights.get("type", "int") == "int" and strategy in ("channel", "group"),
        not weights.get("dynamic") and weights.get("actorder") in (None, "weight", "static"),
        not group.get("output_activations"),
    )
    if not all(known):
        raise ValueError(
            f"config.json has {KEY} with format={format!r} and weights={dict(weights)!r}; supported are pack-quantized "
            "of 8 or 4 bits and int-quantized of 8, a scale a channel or group, without actorder=group"
        )
    return Scheme(
        targets=tuple(map(str, group.get("targets") or ())),
        format=format,
        bits=weights["num_bits"],
        group=weights.get("group_size") if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        act=_act(group.get("input_activations")),
    )


def _act(described: Mapping[str, Any] | None) -> Act | None:
    if not described:
        return None
    if any(described.get(key, value) != value for key, value in ACTIVATIONS.items()):
        raise ValueError(
            f"config.json has {KEY} with input_activations={dict(described)!r}; only {ACTIVATIONS} is supported"
        )
    return ROWS


def locate(
    name: str, tensors: Mapping[str, Tensor], known: Sequence[Scheme], used: set[str]
) -> Located | None:
    """The weight of that name, `M.weight`, among a file's tensors; None where it is not quantized, or not whole.

    Args:
      name: of the weight.
      tensors: of the checkpoint.
      known: schemes, the first that covers M decides.
      used: to which the names that were read are added.
    """
    scheme = next((scheme for scheme in known if scheme.covers(name.removesuffix(".weight"))), None)
    if scheme is None or f"{name}_scale" not in tensors:
        return None
    packs = scheme.format == "pack-quantized"
    parts = [f"{name}_packed" if packs else name, f"{name}_scale"]
    parts += [f"{name}_shape"] * packs + [f"{name}_zero_point"] * (not scheme.symmetric)
    if any(part not in tensors for part in parts):
        return None
    used.update(parts)
    codes, scale = tensors[parts[0]], tensors[parts[1]]
    zero = None if scheme.symmetric else tensors[parts[-1]]
    return _located(scheme, codes, scale, zero)


def _located(scheme: Scheme, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Located:
    per_word = 32 // scheme.bits if scheme.format == "pack-quantized" else 1
    shape = (codes.shape[0], codes.shape[1] * per_word)
    form = Format(
        bits=scheme.bits,
        group=scheme.group,
        scale_dtype=scale.dtype if zero is None else np.float32,  # in which a zero times a scale is exact
        offset=None if zero is None else "zero",
        act=scheme.act,
    )

    def native(first: int, last: int) -> NativeBlocks:
        rows = (slice(first, last),)
        data = _data(codes.read(rows), scheme)
        scales = scale.read(rows)
        if zero is None:
            return NativeBlocks(data, scales, None)
        scales = scales.astype(np.float32)
        return NativeBlocks(data, scales, -_zeros(zero, scheme, shape[0])[first:last] * scales)

    def read(first: int, last: int, dtype: Any) -> np.ndarray:
        return QArray(*native(first, last), bits=scheme.bits).dequantize().astype(dtype)

    return Located(shape, read, native, form)


def _data(stored: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Codes as a `QArray` has them."""
    if scheme.format == "int-quantized":
        return stored
    raw = stored.view(np.uint8)
    if scheme.bits == 8:
        return (raw ^ HALF[8]).view(np.int8)
    return raw ^ HALF[4] if scheme.symmetric else raw


def _zeros(stored: Tensor, scheme: Scheme, rows: int) -> np.ndarray:
    """Which code stands for 0, float32 `[O, groups]`."""
    if scheme.format == "int-quantized":
        return stored.read(dtype=np.float32)
    raw = np.ascontiguousarray(stored.read().T).view(np.uint8)
    if scheme.bits == 4:
        raw = unpack_codes(raw, 4, signed=False)
    return raw.T[:rows].astype(np.float32) - np.float32(128 if scheme.bits == 8 else 0)
