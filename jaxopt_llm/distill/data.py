"""Windows of token ids in random order, through Grain: the same ones in the same order, from any step on."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, "_"]  # of one text; another has another length


def check_installed() -> None:
    """Raises ValueError where Grain is missing, which only training needs."""
    if importlib.util.find_spec("grain") is None:
        raise ValueError("distillation needs grain: pip install 'jaxopt-llm[train]'")


class Windows:
    """Batches of windows without end, by where they begin: every place once, in random order, before any comes again.

    Args:
      texts: token ids, each with its share of the windows.
      batch, length: windows, and tokens of each.
      seed: of the order.
      stride: tokens from one place to the next; at `length` no token is in two windows.

    Raises:
      ValueError: if a text has no whole window.
    """

    def __init__(
        self, texts: Sequence[tuple[Ids, float]], *, batch: int, length: int, seed: int, stride: int = 1
    ):
        for ids, _ in texts:
            if len(ids) < length:
                raise ValueError(
                    f"a training text has {len(ids)} tokens, too few for one window of length={length}; give more "
                    "text or set a smaller length"
                )
        import grain

        self.length = length
        self._ids = np.concatenate([ids for ids, _ in texts])
        ends = np.cumsum([len(ids) for ids, _ in texts]).tolist()
        places = [
            range(end - len(ids), end - length + 1, stride) for end, (ids, _) in zip(ends, texts, strict=True)
        ]
        parts = [
            grain.MapDataset.source(part).seed(seed + number).shuffle().repeat()
            for number, part in enumerate(places)
        ]
        whole = grain.MapDataset.mix(parts, [share for _, share in texts]) if len(parts) > 1 else parts[0]
        self._places = whole.batch(batch)
        # Windows are slices of memory: threads that read ahead would only take cores from the step.
        self._batches = iter(self._places.to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def __next__(self) -> Int[np.ndarray, "B"]:
        return np.asarray(next(self._batches))

    def first(self, batches: int) -> Int[np.ndarray, "B"]:
        """The windows of the first so many batches, each once."""
        return np.unique([self._places[number] for number in range(batches)])

    def tokens(self, places: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B T"]:
        return self._ids[places[:, None] + np.arange(self.length)]

    @property
    def state(self) -> Mapping[str, Any]:
        """Where it stands, for JSON."""
        return self._batches.get_state()

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(dict(state))
