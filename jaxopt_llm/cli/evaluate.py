"""Perplexity of a model on a text and, with --reference, how far its predictions lie from another model's.

The text is read in windows without a BOS. A figure's error comes from how much the windows differ.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxopt_llm import evaluate
from jaxopt_llm.cli import show
from jaxopt_llm.cli.flags import DTYPE, JSON, MESH, MODEL, QUANTIZE, TEXT
from jaxopt_llm.cli.loading import load
from jaxopt_llm.evaluate import Comparison, Perplexity
from jaxopt_llm.text import Tokenizer

REFERENCE = flags.DEFINE_string("reference", None, "Model to compare with, of the same vocabulary.")
WINDOW = flags.DEFINE_integer("window", 1024, "Tokens read at once.")
STRIDE = flags.DEFINE_integer("stride", None, "Tokens from one window to the next; unset, windows do not overlap.")
WINDOWS = flags.DEFINE_integer("windows", None, "Read only the first so many windows.")
BOS = flags.DEFINE_boolean(
    "bos", False, "Put the model's BOS in place of each window's first token: Gemma is lost without it."
)


def main(argv: Sequence[str]) -> None:
    ...
