"""What is told of one model beside others."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxopt_llm import checkpoints, evaluate
from jaxopt_llm.evaluate import Comparison, Perplexity, Reading
from jaxopt_llm.evaluate.estimate import Interval
from jaxopt_llm.models import Transformer, num_bytes, num_params
from jaxopt_llm.text import Tokenizer

Progress = Callable[[str, int, int], None]

HISTOGRAM_EDGES = 10.0 ** np.arange(-7, 2.01, 0.25)  # nats
_WINDOW = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure, its tokenizer, and the file or directory that it came from."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    path: Path | None = None

    @functools.cached_property
    def as_reference(self) -> evaluate.Reference:
        return evaluate.Reference(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one model; None where a figure cannot be had.

    Attributes:
      name: of the model.
      parameters: numbers that it holds.
      file_bytes: of its file, or of the files in its directory.
      bytes: of its parameters in memory, scales included.
      perplexity, bits_per_byte: on the text; bits per byte compare models of different vocabularies.
      kld_mean: mean KL divergence of its predictions from the reference's, nats a token. None for the reference
        itself, and where the two read the text as different tokens; so for the next two and the histogram.
      same_top_p: share of positions where it ranks the same token first.
      kld_histogram: share of the tokens whose divergence lies between two neighbours of `HISTOGRAM_EDGES`; what lies
        beyond them counts in the outermost.
      layer_errors: how far each layer lies from the reference's, as `evaluate.layer_errors` has it; None also where
        layers do not correspond.
      decode_tokens_per_s: of one sequence alone.
      *_interval: of 95 % confidence, from how windows of the text differ.
    """

    name: str
    parameters: int
    file_bytes: int | None
    bytes: int
    perplexity: float
    perplexity_interval: Interval | None
    bits_per_byte: float | None
    bits_per_byte_interval: Interval | None
    kld_mean: float | None = None
    kld_interval: Interval | None = None
    same_top_p: float | None = None
    same_top_interval: Interval | None = None
    kld_histogram: tuple[float, ...] | None = None
    layer_errors: tuple[float, ...] | None = None
    decode_tokens_per_s: float | None = None


def measure(
    subject: Subject,
    text: str,
    *,
    reference: Subject | None = None,
    window: int = _WINDOW,
    windows: int | None = None,
    bos: bool = False,
    speed: bool = True,
    progress: Progress | None = None,
) -> Row:
    """Measures one model on a text, against a reference if there is one.

    Args:
      subject: the model.
      text: to read.
      reference: to compare predictions and layers with, where that can be done.
      window, windows: as `evaluate.Reading` has them.
      bos: put the tokenizer's BOS in place of each window's first token.
      speed: time decoding too.
      progress: called with (stage, parts of it done, of all).

    Raises:
      ValueError: for a text of fewer than two tokens, sizes beyond the context, or a BOS that is not there.
    """
    if bos and subject.tokenizer.bos_id is None:
        raise ValueError(f"{subject.name} has no BOS token to begin windows with; leave bos out")
    stage = lambda name: functools.partial(progress or _ignore, f"{name} {subject.name}")
    reading: Reading = {
        "window": window,
        "windows": windows,
        "bos": subject.tokenizer.bos_id if bos else None,
        "tokenizer": subject.tokenizer,
        "progress": stage("scoring"),
    }
    row = _quality(subject, reference, text, reading)
    if speed:
        timed = evaluate.speed(subject.model, progress=stage("timing"))
        row = dataclasses.replace(row, decode_tokens_per_s=timed.decode_tokens_per_s.median)
    return row


def histogram(values: Float[np.ndarray, "n"]) -> tuple[float, ...]:
    """The share of values between neighbours of `HISTOGRAM_EDGES`."""
    inside = np.clip(values, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(inside, HISTOGRAM_EDGES)
    return tuple(map(float, counts / len(values)))


def _ignore(stage: str, done: int, total: int) -> None: ...


def _quality(subject: Subject, reference: Subject | None, text: str, reading: Reading) -> Row:
    ids = subject.tokenizer.encode(text, add_special=False)
    if reference is None or not _reads_alike(subject, reference, text, ids):
        return _own(subject, evaluate.perplexity(subject.model, ids, **reading))
    found = evaluate.compare(subject.model, reference.as_reference, ids, **reading)
    row = _beside(_own(subject, found.perplexity), found)
    if not evaluate.layers_correspond(subject.model, reference.model):
        return row
    first = np.asarray(ids[: reading["window"]], np.int32)
    errors = evaluate.layer_errors(subject.model, reference.model, first)
    return dataclasses.replace(row, layer_errors=tuple(map(float, errors)))


def _reads_alike(subject: Subject, reference: Subject, text: str, ids: list[int]) -> bool:
    """Whether predictions can be compared token by token."""
    if subject.model.config.vocab_size != reference.model.config.vocab_size:
        return False
    return reference.tokenizer.encode(text, add_special=False) == ids


def _own(subject: Subject, found: Perplexity) -> Row:
    return Row(
        name=subject.name,
        parameters=num_params(subject.model),
        file_bytes=None if subject.path is None else checkpoints.file_bytes(subject.path),
        bytes=num_bytes(subject.model),
        perplexity=found.perplexity,
        perplexity_interval=found.interval,
        bits_per_byte=found.bits_per_byte,
        bits_per_byte_interval=found.bits_per_byte_interval,
    )


def _beside(row: Row, found: Comparison) -> Row:
    return dataclasses.replace(
        row,
        kld_mean=found.kld_mean,
        kld_interval=found.kld_interval,
        same_top_p=found.same_top_p,
        same_top_interval=found.same_top_interval,
        kld_histogram=histogram(found.token_kld),
    )
