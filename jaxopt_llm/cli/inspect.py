"""Family, shapes and bytes of a model, from its config and the headers of its files: no weights are read.

A directory that holds config.json alone will do; its bytes are then those of the parameters in memory.

With --step the engine's decode step is compiled, from shapes alone, and told part by part: operations launched, bytes,
FLOPs, the least time that a machine needs for it, and what each fusion saves.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from absl import flags

from jaxopt_llm import checkpoints
from jaxopt_llm.cli import inspect_step, show
from jaxopt_llm.cli.flags import CHIP, DTYPE, JSON, MODEL, QUANTIZE
from jaxopt_llm.models import ModelConfig, ParamSpec, abstract, num_params, specs

STEP = flags.DEFINE_boolean("step", False, "Compile the decode step and tell what it does.")
ROWS = flags.DEFINE_integer("rows", 1, "With --step: sequences that decode together.")
CONTEXT = flags.DEFINE_integer("context", 1024, "With --step: tokens of each in the cache.")

FUSIONS = flags.DEFINE_boolean(
    "fusions", True, "With --step: compile it without each fusion too, which takes five times as long."
)


def main(argv: Sequence[str]) -> None:
    if STEP.value:
        _step()
    else:
        _model()


def _step() -> None:
    step = inspect_step.report(
        MODEL.value,
        dtype=DTYPE.value,
        quantize=QUANTIZE.value,
        chip=inspect_step.HERE if CHIP.value is None else CHIP.value,
        rows=ROWS.value,
        context=CONTEXT.value,
        fusions=FUSIONS.value,
    )
    if JSON.value:
        show.json_line(step)
    else:
        inspect_step.tell(step)


def _model() -> None:
    config, path = checkpoints.read_config(MODEL.value)
    dtype = checkpoints.default_dtype()
    model = abstract(config, dtype)
    parameters = num_params(model)
    stored = checkpoints.stored_bytes(path)
    sizes = stored or {str(dtype): parameters * dtype.itemsize}
    report = {
        "path": path,
        "weights": "stored" if stored else f"absent; bytes are those in memory as {dtype}",
        "parameters": parameters,
        "bytes": sum(sizes.values()),
        "bytes_by_dtype": sizes,
        **_settings(config),
        "kv_bytes_per_token": config.kv_bytes_per_token(dtype),
        "kv_dtype": dtype,
    }
    groups = _groups(specs(model))
    if JSON.value:
        show.json_line(report | {"shapes": {name: shape for name, shape, *_ in groups}})
    else:
        show.fields(report | {"bytes_by_dtype": [f"{name} {size:,}" for name, size in sizes.items()]})
        show.table(("parameter", "shape", "count", "numbers", "share"), _rows(groups, parameters))


def _settings(config: ModelConfig) -> dict[str, object]:
    """What tells one model from another, in short."""
    experts = config.experts
    return {
        "family": config.family,
        "max_seq_len": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "windows": sorted({window for window in config.windows if window}) or None,
        "experts": experts and f"{experts.count}, {experts.per_token} a token",
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}",
        "tied": config.tied,
    }


def _groups(parameters: dict[str, ParamSpec]) -> list[tuple[str, tuple[int, ...], int]]:
    """Parameters that differ by their layer alone, as (name, shape, how many)."""
    counts: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for name, spec in parameters.items():
        counts[re.sub(r"^layers\.\d+\.", "layers.*.", name), spec.shape] += 1
    return [(name, shape, count) for (name, shape), count in counts.items()]


def _rows(groups: Sequence[tuple[str, tuple[int, ...], int]], parameters: int) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for name, shape, count in groups:
        numbers = count * math.prod(shape)
        rows.append((name, " x ".join(map(str, shape)), count, numbers, f"{numbers / parameters:.1%}"))
    return rows
