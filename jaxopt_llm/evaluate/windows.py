"""A long text cut into windows that a model reads one at a time."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Ids = Sequence[int] | Int[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of a text, one a row.

    Attributes:
      tokens: what the model reads; past the end of the text stands padding.
      scored: whether the prediction at this position, of the token after it, counts.
    """

    tokens: Int[np.ndarray, "W T"]
    scored: Bool[np.ndarray, "W T"]

    @property
    def window_targets(self) -> list[Int[np.ndarray, "n"]]:
        """The tokens of each window whose predictions count."""
        following = np.roll(self.tokens, -1, axis=1)
        return [row[counts] for row, counts in zip(following, self.scored, strict=True)]


def check_sizes(
    *, window: int, stride: int | None = None, windows: int | None = None, context: int | None = None
) -> None:
    """Raises ValueError for sizes that no text can be cut into (see `cut`), or beyond a model's context."""
    if window < 2:
        raise ValueError(f"{window=} must be at least 2: a window's first token is not predicted")
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(f"{stride=} must be at least 1 and at most {window=}, or tokens would be left out")
    if windows is not None and windows < 1:
        raise ValueError(f"{windows=} must be at least 1")
    if context is not None and window > context:
        raise ValueError(f"{window=} is longer than the model's context of {context}; try window={context}")


def check_text(ids: Ids) -> None:
    """Raises ValueError for a text too short to predict anything in it."""
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed to predict one from another")


def cut(
    ids: Ids,
    *,
    window: int,
    stride: int | None = None,
    windows: int | None = None,
    bos: int | None = None,
) -> Windows:
    """Windows of `window` tokens, each `stride` (None: `window`) after the one before.

    A window predicts all its tokens but the first. Where windows overlap, each token counts once, in the first
    window that predicts it, so that later windows count their last `stride` tokens. What remains at the end
    makes a shorter window. `windows` keeps the first so many; `bos` takes the place of each window's first token.

    Raises:
      ValueError: for a text of fewer than two tokens, or sizes that cut nothing.
    """
    check_sizes(window=window, stride=stride, windows=windows)
    stride = window if stride is None else stride
    check_text(ids)
    context = max(1, window - stride)  # tokens of a later window that do not count
    starts = np.array([s for s in range(0, len(ids), stride) if s == 0 or s + context < len(ids)][:windows])
    within = np.arange(1, window + 1)  # where in its window the token after each position stands
    place = starts[:, None] + within[None, :]
    first = np.where(starts == 0, 1, context)
    scored = (place < len(ids)) & (within < window)[None, :] & (within[None, :] >= first[:, None])
    tokens = np.pad(np.asarray(ids, np.int32), (0, window))[place - 1]
    if bos is not None:
        tokens[:, 0] = bos
    return Windows(tokens=tokens, scored=scored)
