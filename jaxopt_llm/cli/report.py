"""Compare models on one text: size, perplexity, distance to a reference, speed; as a table and a page with plots.

MODEL is named as --model is elsewhere: a checkpoint of ours, a Hugging Face directory, a GGUF file. The first is the
reference unless --reference names one. Without --text they read the three Wikipedia articles that ship with the
package.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from jaxopt_llm import checkpoints, evaluate
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import BOS, DTYPE, JSON, MESH, OUT, REFERENCE, TEXT, WINDOW, WINDOWS
from jaxopt_llm.cli.loading import load_whole
from jaxopt_llm.cli.measuring import read_text, stages
from jaxopt_llm.cli.writing import out_path
from jaxopt_llm.optimize import sample_text
from jaxopt_llm.report import HISTOGRAM_EDGES, Row, Subject, columns, measure, page, require_plots

ARGUMENTS = "MODEL [MODEL ...]"
SPEED = flags.DEFINE_boolean("speed", True, "Time decoding.")


def main(argv: Sequence[str]) -> None:
    sources = argv[1:]
    if not sources:
        raise ValueError(
            "report needs models to compare: jaxopt-llm report MODEL [MODEL ...] --out=page.html"
        )
    evaluate.check_sizes(window=WINDOW.value, windows=WINDOWS.value)
    require_plots()
    out = out_path(OUT.value, marker=None)
    text = sample_text() if TEXT.value is None else read_text(TEXT.value)
    for source in filter(None, [REFERENCE.value, *sources]):
        checkpoints.resolve(source)  # a wrong name is told before the others have taken minutes
    rows = list(_rows(sources, text))
    html = page("Models side by side", rows, subtitle=_subtitle(sources))
    with atomic_file(out) as file:
        file.write(html.encode())
    if JSON.value:
        show.json_line({"models": rows, "kld_histogram_edges": HISTOGRAM_EDGES, "out": out})
    else:
        shown = columns(rows)
        cells = [[f"{column.text(row)} {column.below(row)}".strip() for column in shown] for row in rows]
        show.table([column.title for column in shown], cells, right=range(1, len(shown)))
        print(f"\nsaved to {out}")


def _rows(sources: Sequence[str], text: str) -> Iterator[Row]:
    """Figures of each model; no more than one is in memory beside the reference."""
    names = _names(sources)
    reference = _load(REFERENCE.value, REFERENCE.value) if REFERENCE.value else _load(sources[0], names[0])
    for place, (source, name) in enumerate(zip(sources, names, strict=True)):
        is_reference = place == 0 and not REFERENCE.value
        with stages("steps") as report:
            yield measure(
                reference if is_reference else _load(source, name),
                text,
                reference=None if is_reference else reference,
                window=WINDOW.value,
                windows=WINDOWS.value,
                bos=BOS.value,
                speed=SPEED.value,
                progress=report,
            )


def _names(sources: Sequence[str]) -> list[str]:
    """The last parts of the paths, or the whole ones where those are not enough."""
    short = [Path(source).name for source in sources]
    return short if len(set(short)) == len(short) and all(short) else list(sources)


def _load(source: str, name: str) -> Subject:
    model, tokenizer = load_whole(source, dtype=DTYPE.value, mesh=MESH.value)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, and text cannot be scored without one")
    path = checkpoints.resolve(source)
    return Subject(name=name, model=model, tokenizer=tokenizer, path=path if isinstance(path, Path) else None)


def _subtitle(sources: Sequence[str]) -> str:
    text = "the text that ships with the package" if TEXT.value is None else Path(TEXT.value).name
    number = "" if WINDOWS.value is None else f"the first {WINDOWS.value} "
    reference = Path(REFERENCE.value or sources[0]).name
    return f"On {number}windows of {WINDOW.value:,} tokens of {text}; the reference is {reference}"
