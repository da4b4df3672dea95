"""Train a small model to predict what a large one predicts, and tell what that brought.

Text to train on is what --train names, and what the teacher writes where the config says so. What the run measures goes
to OUT.run/ (metrics.jsonl, tensorboard/, loss.png), its snapshots too: after a kill, --resume continues from the last.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxopt_llm import checkpoints, configs
from jaxopt_llm import distill as d
from jaxopt_llm.checkpoints.orbax import MARKER
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import CONFIG, JSON, OUT, SET, TEXT
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import read_text, stages
from jaxopt_llm.cli.writing import out_path
from jaxopt_llm.optimize import sample_text
from jaxopt_llm.sharding import MeshSpec

TEACHER = flags.DEFINE_string("teacher", None, "Model to learn from, named as --student is.", required=True)
STUDENT = flags.DEFINE_string(
    "student", None, "Model to train: a directory, a .gguf file, hf:org/name, or a known name.", required=True
)
TRAIN = flags.DEFINE_multi_string("train", [], "UTF-8 file to train on; several where it is given again")
RESUME = flags.DEFINE_boolean("resume", False, "Continue the run that was interrupted.")
TEACHER_QUANTIZE = flags.DEFINE_string(
    "teacher_quantize",
    None,
    "Round the teacher's weights while they are read: a format as --quantize of other commands takes.",
)
STUDENT_QUANTIZE = flags.DEFINE_string(
    "student_quantize",
    None,
    "Round the student's weights, to train adapters beside them (lora in the config).",
)
SPREAD = flags.DEFINE_string("mesh", None, "Devices to spread both models over, such as data=2,tensor=2.")

COLUMNS = {
    "step": "step",
    "loss": "loss",
    "divergence": "divergence",
    "cross_entropy": "cross-entropy",
    "gradient_norm": "gradient",
    "learning_rate": "rate",
    "seconds": "seconds",
}


def main(argv: Sequence[str]) -> None:
    d.check_installed()
    config = configs.load(CONFIG.value, SET.value)
    if not isinstance(config, d.Distillation):
        raise ValueError(
            f"--config={CONFIG.value} is a {type(config).__name__}; distill takes a Distillation"
        )
    adapters = config.lora is not None and not config.lora.merge
    out = out_path(OUT.value, marker=checkpoints.ADAPTER_MARKER if adapters else MARKER)
    run = out.with_name(f"{out.name}.run")
    held_out = sample_text() if TEXT.value is None else read_text(TEXT.value)
    texts = [read_text(path) for path in TRAIN.value]
    if held_out in texts:
        raise ValueError(
            "--text is for measuring alone, and --train names the same text; take another for one of them"
        )
    mesh = None if SPREAD.value is None else MeshSpec.parse(SPREAD.value)
    teacher = load(TEACHER.value, mesh=mesh, quantize=TEACHER_QUANTIZE.value)
    student = load(STUDENT.value, mesh=mesh, quantize=STUDENT_QUANTIZE.value)
    with stages("") as report:
        outcome = d.distill(
            d.Model(*teacher),
            d.Model(*student),
            config,
            texts=texts,
            held_out=held_out,
            folder=run,
            resume=RESUME.value,
            consume=True,
            progress=report,
            told=show.lines(COLUMNS),
        )
    if config.lora is None or outcome.adapters is None:
        checkpoints.save(outcome.model, student[1], out)
    else:
        checkpoints.export_adapter(student[0].config, outcome.adapters, out, alpha=config.lora.alpha)
    d.finish(run)
    tell(outcome, out)


def tell(outcome: d.Outcome, out: Path) -> None:
    """Prints what came of it."""
    names = ("loss", "tokens", "perplexity_before", "perplexity_after", "teacher_perplexity")
    values = {name: getattr(outcome, name) for name in names}
    values |= {name: getattr(outcome, name) for name in ("seconds", "tokens_per_s", "peak_bytes")}
    if JSON.value:
        show.json_line(values | {"out": out})
        return
    show.fields({name.replace("_", " "): value for name, value in values.items()})
    print(f"\nsaved to {out}")
