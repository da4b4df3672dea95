"""What a teacher predicts, on disk: it reads each window once, however often training comes back to it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxopt_llm.distill import losses
from jaxopt_llm.distill.blocks import block_rows, mapped
from jaxopt_llm.distill.data import Windows
from jaxopt_llm.distill.losses import TopK
from jaxopt_llm.models import Batch, Transformer, as_run, mesh_of
from jaxopt_llm.sharding import split_over

PREDICTIONS = "predictions.bin"  # in the folder of the run


class Predictions:
    """The k likeliest tokens after each token of some windows, and the share of all others, mapped from a file.

    The file has a record a token: ids, in the narrowest type that holds the vocabulary's, and log-probabilities in
    float32: float16 would round them by up to 5e-4 of their size.

    Args:
      folder: of the run. What a killed process of the same run left there is gone on with.
      teacher: any model, quantized too.
      windows: to train on.
      batches: of them that training takes.
      batch: windows of a forward pass of the teacher.
      k: tokens to keep.
      progress: called with (passes done, of all).
    """

    def __init__(
        self,
        folder: Path,
        teacher: Transformer,
        windows: Windows,
        *,
        batches: int,
        batch: int,
        k: int,
        progress: Callable[[int, int], None],
    ):
        self._places = windows.first(batches)
        passes = np.pad(self._places, (0, -len(self._places) % batch), "edge").reshape(-1, batch)
        record = _record(k, teacher.config.vocab_size)
        size = batch * windows.length * record.itemsize
        read = _reader(teacher, k)
        with (folder / PREDICTIONS).open("ab") as file:
            done = file.tell() // size
            file.truncate(done * size)  # a pass is whole or not at all
            for number, places in enumerate(passes[done:], done):
                progress(number, len(passes))
                found, records = read(windows.tokens(places)), np.empty(batch * windows.length, record)
                for name, value in found._asdict().items():
                    records[name] = value
                file.write(records.data)
                file.flush()
                os.fsync(file.fileno())
        progress(len(passes), len(passes))
        self._records = np.memmap(folder / PREDICTIONS, record, mode="r").reshape(-1, windows.length)

    def __getitem__(self, places: Int[np.ndarray, "B"]) -> TopK:
        """Of the windows that begin at these places."""
        found = self._records[np.searchsorted(self._places, places)]
        return TopK(found["ids"].astype(np.int32), found["logprobs"].copy(), found["tail"].copy())


def _record(k: int, vocab_size: int) -> np.dtype:
    ids = np.min_scalar_type(vocab_size - 1)
    return np.dtype([("logprobs", np.float32, (k,)), ("tail", np.float32), ("ids", ids, (k,))])


def _reader(teacher: Transformer, k: int) -> Callable[[Int[np.ndarray, "B T"]], TopK]:
    """What gives a teacher's predictions, a row a token."""
    graph, params = nnx.split(as_run(teacher))
    mesh, rows = mesh_of(teacher), block_rows(teacher.config.vocab_size)

    @jax.jit
    def read(params: Any, tokens: Int[Array, "B T"]) -> TopK:
        hidden, _ = nnx.merge(graph, params).forward(Batch.dense(tokens), None)
        top_k = lambda hidden: losses.top_k(nnx.merge(graph, params).logits(hidden), k)
        return mapped(top_k, rows, hidden)

    def placed(tokens: Int[np.ndarray, "B T"]) -> Any:
        return tokens if mesh is None else jax.device_put(tokens, split_over(mesh, "data", "sequence"))

    return lambda tokens: jax.tree.map(np.asarray, read(params, placed(tokens)))
