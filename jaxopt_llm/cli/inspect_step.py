"""`inspect --step`: what the engine's decode step of a model launches, reads and computes, and what bounds it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_llm import checkpoints
from jaxopt_llm.cli import show
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import stages
from jaxopt_llm.evaluate import roofline
from jaxopt_llm.evaluate.roofline import Machine, Step
from jaxopt_llm.kernels import quantization_format
from jaxopt_llm.models import Transformer, abstract, place
from jaxopt_llm.sharding import MeshSpec, Sharding, topologies
from jaxopt_llm.sharding.chips import CHIPS, Chip, chip_of

HERE = "here"
_FUSIONS = {
    "qkv": "q, k and v in one product",
    "norm": "norm (and rounding) in the product",
    "gate_up": "gate and up in one product",
    roofline.SAMPLING: "sampling in the step",
}
_NOTES = """\
One figure a layer, layers alike in one row; share and total are of all. Read from the compiled program: an operation
reads each operand once as far as it lies in main memory, a conditional counts as its largest branch, attention reads
all of the context. FLOPs are those of matrix products. The bound lets each part take what the slower of its bytes and
its FLOPs needs."""


def report(
    source: str,
    *,
    dtype: str | None,
    quantize: str | None,
    chip: str,
    rows: int,
    context: int,
    fusions: bool,
) -> Step:
    """The step of a model on the machine at hand, or on a chip that need not be there.

    Raises:
      ValueError: for a chip that is unknown, or that nothing here can compile for.
    """
    known = None if chip == HERE else _known(chip)
    device = jax.devices()[0] if known is None else _device(known)
    present = known is None or device in jax.devices()
    model = _model(source, dtype, quantize, device, present)
    machine = Machine.published(known) if known else Machine.here(model.dtype)
    with stages("programs") as told:
        return roofline.decode_step(
            model,
            machine,
            rows=rows,
            context=min(context, model.config.max_seq_len),
            fusions=fusions,
            progress=lambda done, total: told("compiling", done, total),
        )


def _known(name: str) -> Chip:
    if name not in CHIPS:
        raise ValueError(f"--chip={name} is unknown; known are {HERE}, {', '.join(CHIPS)}")
    return CHIPS[name]


def _device(chip: Chip) -> jax.Device:
    """To compile for: the chip itself where it is there, else its topology.

    Raises:
      ValueError: if it has neither, or its compiler is not installed.
    """
    device = jax.devices()[0]
    if chip_of(device) == chip:
        return device
    try:
        if not any(kind.startswith("TPU") for kind in chip.kinds):
            return topologies.gpu(chip.name)[0]
        return topologies.tpu(chip.name, "2x2x1" if chip.links == 6 else "2x2")[0]
    except (ModuleNotFoundError, ValueError) as error:
        raise ValueError(f"--chip={chip.name}: {error}") from None


def _model(
    source: str, dtype: str | None, quantize: str | None, device: jax.Device, present: bool
) -> Transformer:
    """From shapes alone, but for files whose own codes are kept: those are loaded."""
    config, path = checkpoints.read_config(source)
    if dtype == "native" or checkpoints.is_own(path):
        if not present:
            raise ValueError(
                "codes as a file has them are packed for the machine that loads them; "
                f"name --quantize instead, or --chip={HERE}"
            )
        return load(source, dtype=dtype, quantize=quantize)[0]
    default = checkpoints.default_dtype() if present else jnp.bfloat16
    rounding = None if quantize is None else quantization_format(quantize)
    model = abstract(
        config, jnp.dtype(default if dtype is None else checkpoints.float_dtype(dtype)), rounding
    )
    return place(model, Sharding(MeshSpec().build([device]), config.units))


def tell(step: Step) -> None:
    """Prints it as tables."""
    machine = step.machine
    rates = f"{show.si(machine.bandwidth, 'B/s')}, {show.si(machine.flops, 'FLOP/s')}"
    print(f"A decode step of {step.rows} x {step.context:,} tokens on {machine.name}")
    print(f"{rates}, {'measured' if machine.measured else 'published'}\n")
    columns = ("part", "count", "launched", "read", "written", "FLOPs", "bound", "share")
    rows: list[tuple[Any, ...]] = [
        (
            part.name, part.count, round(part.launched), show.si(part.read, "B"), show.si(part.written, "B"),
            show.si(part.flops), _time(part.bound_s), f"{part.share:.1%}",
        )
        for part in step.parts
    ]  # fmt: skip
    total = (
        "total", None, step.launched, show.si(step.read, "B"), show.si(step.written, "B"),
        show.si(step.flops), _time(step.bound_s), "100.0%",
    )  # fmt: skip
    show.table(columns, [*rows, total], right=range(1, len(columns)))
    print(f"At best {step.bound_s * 1e3:,.3g} ms a step, {step.tokens_per_s:,.0f} tokens/s\n")
    if step.fusions:
        _tell_fusions(step)
    print(_NOTES)
    if step.unknown:
        print(f"FLOPs of these kernels are not counted, as nothing tells them: {', '.join(step.unknown)}.")


def _tell_fusions(step: Step) -> None:
    fusions = [
        (
            _FUSIONS[each.name], each.launched, each.launched_without, each.launched_without - each.launched,
            show.si(each.nbytes, "B"), show.si(each.nbytes_without, "B"),
            show.si(each.nbytes_without - each.nbytes, "B"),
        )
        for each in step.fusions
    ]  # fmt: skip
    names = ("fusion", "launched", "without", "saved", "bytes", "without", "saved")
    show.table(names, fusions, right=range(1, len(names)))
    logits = show.si(step.logit_bytes, "B")
    print(
        f"Without sampling in the step a token takes two dispatches, and {logits} of logits leave the first.\n"
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
