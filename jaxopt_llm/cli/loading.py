"""A model under a progress bar."""

import contextlib
from collections.abc import Callable
from typing import Any

from jaxopt_llm import checkpoints
from jaxopt_llm.cli import show
from jaxopt_llm.models import Transformer
from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.text import Tokenizer


def load_draft(
    source: str | None, tokenizer: Tokenizer | None, *, adapter: str | None = None, **options: Any
) -> Transformer | None:
    """The model to draft with, loaded as the large one is, but for its adapter; None if there is no source.

    Raises:
      ValueError: if its tokenizer gives other ids.
    """
    if source is None:
        return None
    draft, own = load(source, **options)
    if own and tokenizer and own.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ValueError(
            f"--draft_model={source} has another tokenizer than the model; take one with the same"
        )
    return draft


def load(source: str, *, mesh: str | None = None, **options: Any) -> tuple[Transformer, Tokenizer | None]:
    """`load_model`.

    Raises:
      ValueError: also for a mesh with a data axis: no command splits a batch.
    """
    if mesh not in (None, checkpoints.AUTO) and MeshSpec.parse(mesh).data > 1:
        raise ValueError(f"--mesh={mesh}: this command does not split batches over data yet; leave data at 1")
    return load_model(source, mesh=mesh, **options)


def load_model(source: str, **options: Any) -> tuple[Transformer, Tokenizer | None]:
    """`checkpoints.load`, its progress on stderr, on any mesh."""
    advance: Callable[[float], None] | None = None
    done = 0
    with contextlib.ExitStack() as stack:

        def progress(placed: int, total: int) -> None:
            nonlocal advance, done
            if advance is None:  # the total is known once the headers are read
                advance = stack.enter_context(show.progress("loading", total, "params"))
            advance(placed - done)
            done = placed

        return checkpoints.load(source, progress=progress, **options)
