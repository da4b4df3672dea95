"""Make a model smaller by a recipe, measure it before and after, save it: the main job.

Without --text it is measured on three Wikipedia articles that ship with the package. Steps that need a text see that of
--calibration; without, what the model itself says. OUT.run/ keeps finished steps until the result is saved: after an
interruption the same command goes on.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from jaxopt_llm import checkpoints, configs
from jaxopt_llm.checkpoints.orbax import MARKER
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import ADAPTER, CONFIG, DTYPE, JSON, MESH, MODEL, OUT, SET, TEXT
from jaxopt_llm.cli.loading import load_whole
from jaxopt_llm.cli.measuring import read_text, stages
from jaxopt_llm.cli.writing import existing_parent, out_path
from jaxopt_llm.optimize import Outcome, Recipe, optimize

CALIBRATION = flags.DEFINE_string(
    "calibration", None, "UTF-8 file that the steps may see; not the one to measure on."
)

SPARSE = 0.05  # share of zeros that is no accident

ROWS = {
    "parameters": "parameters",
    "file_bytes": "bytes of the file",
    "bytes": "bytes in memory",
    "perplexity": "perplexity",
    "kld_mean": "KL divergence from the original",
    "same_top_p": "same top token as the original",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
}

STEPS = {
    "step": "after",
    "parameters": "parameters",
    "bytes": "bytes in memory",
    "perplexity": "perplexity",
    "kld_mean": "KL divergence",
    "same_top_p": "same top token",
    "seconds": "seconds",
}


def main(argv: Sequence[str]) -> None:
    recipe = configs.load(CONFIG.value, SET.value)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--config={CONFIG.value} is a {type(recipe).__name__}; optimize takes a Recipe")
    out = out_path(OUT.value, marker=MARKER)
    text = None if TEXT.value is None else read_text(TEXT.value)
    calibration = None if CALIBRATION.value is None else read_text(CALIBRATION.value)
    source = checkpoints.resolve(MODEL.value)
    model, tokenizer = load_whole(
        MODEL.value,
        dtype=DTYPE.value,
        mesh=MESH.value,
        adapter=ADAPTER.value,
        offload=existing_parent(out) if MESH.value is None and jax.default_backend() == "cpu" else None,
    )
    with stages("steps") as report:
        outcome = optimize(
            model,
            tokenizer,
            recipe,
            text=text,
            calibration=calibration,
            source=source,
            out=out,
            progress=report,
        )
    if JSON.value:
        names = ("before", "after", "steps", "sample")
        show.json_line({name: getattr(outcome, name) for name in names} | {"out": out})
    else:
        tell(outcome, recipe.measure.question, out)


def tell(outcome: Outcome, question: str, out: Path) -> None:
    """Prints what was done."""
    before, after = outcome.before, outcome.after
    rows = [(label, getattr(before, name), getattr(after, name)) for name, label in ROWS.items()]
    show.table(("", "before", "after"), rows)
    if len(outcome.steps) > 1:
        print()
        show.table(list(STEPS.values()), [[getattr(step, name) for name in STEPS] for step in outcome.steps])
    if before.file_bytes and after.file_bytes and after.file_bytes > before.file_bytes:
        old, new = before.file_bytes / 1e6, after.file_bytes / 1e6
        bits = 8 * before.file_bytes / before.parameters
        print(
            f"The result, {new:.1f} MB, is larger than the file it came from, {old:.1f} MB, "
            f"which stores {bits:.1f} bits a parameter."
        )
    if after.zeros > SPARSE:
        print(
            f"{after.zeros:.0%} of the parameters are zeros. They are stored and multiplied like any other: without a "
            "kernel for sparse weights they save neither bytes nor time."
        )
    print(f"\n> {question}\n{outcome.sample.strip()}\n\nsaved to {out}")
