"""A model under a progress bar."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxopt_llm import checkpoints
from jaxopt_llm.cli import show
from jaxopt_llm.models import Transformer
from jaxopt_llm.sharding import MESH_AXES, MeshSpec
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


def load_whole(
    source: str, *, mesh: str | None = None, splits: Sequence[str] = ("expert", "tensor"), **options: Any
) -> tuple[Transformer, Tokenizer | None]:
    """`load`, for a command that runs whole forwards.

    Args:
      source: a checkpoint.
      mesh: as the flag has it.
      splits: mesh axes that the command can split over.
      **options: as `load` has them.

    Raises:
      ValueError: also for a mesh with another axis.
    """
    if mesh not in (None, checkpoints.AUTO):
        spec = MeshSpec.parse(mesh)
        for axis in MESH_AXES:
            if axis not in splits and getattr(spec, axis) > 1:
                raise ValueError(f"--mesh={mesh}: this command runs no {axis} axis; leave {axis} at 1")
    return load(source, mesh=mesh, **options)


def load(source: str, **options: Any) -> tuple[Transformer, Tokenizer | None]:
    """`checkpoints.load`, its progress on stderr."""
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
