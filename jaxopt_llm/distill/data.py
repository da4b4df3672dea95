"""Windows of token ids at random places, through Grain: the same ones in the same order, from any step on."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class _Places:
    """Every window of a text, by its first token."""

    ids: Ids
    length: int

    def __len__(self) -> int:
        return len(self.ids) - self.length + 1

    def __getitem__(self, start: Any) -> Int[np.ndarray, "T"]:
        return self.ids[int(start) : int(start) + self.length]


class Windows:
    """Batches of windows without end: every place once, in random order, before any comes again.

    Args:
      texts: token ids, each with its share of the windows.
      batch, length: windows, and tokens of each.
      seed: of the order.

    Raises:
      ValueError: if a text has no whole window.
    """

    def __init__(self, texts: Sequence[tuple[Ids, float]], *, batch: int, length: int, seed: int):
        for ids, _ in texts:
            if len(ids) < length:
                raise ValueError(
                    f"a training text has {len(ids)} tokens, too few for one window of length={length}; give more "
                    "text or set a smaller length"
                )
        import grain

        parts = [
            grain.MapDataset.source(_Places(ids, length)).seed(seed + number).shuffle().repeat()
            for number, (ids, _) in enumerate(texts)
        ]
        whole = grain.MapDataset.mix(parts, [share for _, share in texts]) if len(parts) > 1 else parts[0]
        # Windows are slices of memory: threads that read ahead would only take cores from the step.
        self._batches = iter(whole.batch(batch).to_iter_dataset(grain.ReadOptions(num_threads=0)))

    def __next__(self) -> Int[np.ndarray, "B T"]:
        return np.asarray(next(self._batches), np.int32)

    @property
    def state(self) -> Mapping[str, Any]:
        """Where it stands, for JSON."""
        return self._batches.get_state()

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(dict(state))
