"""Perplexity of a model on a text and, with --reference, how far its predictions lie from another model's.

The text is read in windows, without a BOS. Intervals, of 95 % confidence, come from how much the windows differ.
"""

import functools
from collections.abc import Sequence

from absl import flags

from jaxopt_llm import evaluate
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import DTYPE, JSON, LOADING, MESH, MODEL, TEXT
from jaxopt_llm.cli.loading import load
from jaxopt_llm.cli.measuring import read_text, stages
from jaxopt_llm.models import Transformer
from jaxopt_llm.text import Tokenizer

REFERENCE = flags.DEFINE_string("reference", None, "Model to compare with, of the same vocabulary.")
WINDOW = flags.DEFINE_integer("window", 1024, "Tokens read at once.")
STRIDE = flags.DEFINE_integer("stride", None, "Tokens from a window to the next. Unset: no overlap.")
WINDOWS = flags.DEFINE_integer("windows", None, "Read only the first so many windows.")
BOS = flags.DEFINE_boolean(
    "bos", False, "Put a BOS in place of each window's first token. Gemma predicts badly without."
)


def main(argv: Sequence[str]) -> None:
    if TEXT.value is None:
        raise ValueError("eval needs --text, a UTF-8 file to score")
    evaluate.check_sizes(window=WINDOW.value, stride=STRIDE.value, windows=WINDOWS.value)
    text = read_text(TEXT.value)
    model, tokenizer = load(MODEL.value, **LOADING.value)
    if tokenizer is None:
        raise ValueError(f"{MODEL.value} has no tokenizer, and text cannot be scored without one")
    reference = _load_reference(REFERENCE.value, tokenizer, text) if REFERENCE.value else None
    figures = measure(model, reference, tokenizer, text)
    if JSON.value:
        show.json_line(figures)
    else:
        show.fields(figures)


def _load_reference(source: str, tokenizer: Tokenizer, text: str) -> Transformer:
    """The model to compare with, which must read the text as the same tokens."""
    reference, own = load(source, dtype=DTYPE.value, mesh=MESH.value)
    if own is not None and own.encode(text, add_special=False) != tokenizer.encode(text, add_special=False):
        raise ValueError(
            f"--reference={source} reads the text as other tokens than --model={MODEL.value}; "
            "only models of one tokenizer can be compared token by token"
        )
    return reference


def measure(
    model: Transformer, reference: Transformer | None, tokenizer: Tokenizer, text: str
) -> dict[str, object]:
    """Everything the command prints, by name."""
    if BOS.value and tokenizer.bos_id is None:
        raise ValueError("--bos: the model's tokenizer has no BOS token; drop the flag")
    ids = tokenizer.encode(text, add_special=False)
    with stages("windows") as report:
        options: evaluate.Reading = {
            "window": WINDOW.value,
            "stride": STRIDE.value,
            "windows": WINDOWS.value,
            "bos": tokenizer.bos_id if BOS.value else None,
            "tokenizer": tokenizer,
            "progress": functools.partial(report, "scoring"),
        }
        if reference is None:
            return _own(evaluate.perplexity(model, ids, **options))
        found = evaluate.compare(model, reference, ids, **options)
    return _own(found.perplexity) | {
        "kld_mean": found.kld_mean,
        "kld_stderr": found.kld_stderr,
        "kld_interval": found.kld_interval,
        "same_top_p": found.same_top_p,
        "same_top_interval": found.same_top_interval,
        "reference_perplexity": found.reference.perplexity,
    }


def _own(found: evaluate.Perplexity) -> dict[str, object]:
    return {
        "perplexity": found.perplexity,
        "perplexity_stderr": found.stderr,
        "perplexity_interval": found.interval,
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_interval": found.bits_per_byte_interval,
        "tokens": found.tokens,
    }
