"""Where a run stands, on disk: written beside the training, whole or not at all, and read back bit by bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.distill.step import State

_RUN = "run.json"


class Snapshots:
    """The latest states of one run.

    Args:
      folder: of the run; made if it is not there.
      run: what makes the run: one that differs is not continued.
      resume: continue the run that is there, if there is one.

    Raises:
      ValueError: if a run is there and `resume` is not set, or it is another run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, resume: bool):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
        started = folder / _RUN
        if started.exists():
            self._check(json.loads(started.read_text("utf-8")), json.loads(json.dumps(run)), resume)
        else:
            with atomic_file(started) as file:
                file.write(json.dumps(run, indent=1).encode())
        self._manager = ocp.CheckpointManager((folder / "snapshots").absolute(), options=options)

    def _check(self, there: Mapping[str, Any], run: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"{self.folder} holds a run that has not ended; continue it with --resume, or remove it to start anew"
            )
        differs = [name for name in {**there, **run} if there.get(name) != run.get(name)]
        if differs:
            found = ", ".join(f"{name} was {there.get(name)!r} and is {run.get(name)!r}" for name in differs)
            raise ValueError(
                f"{self.folder} holds another run: {found}; resume with the same settings, or take another --out"
            )

    def save(self, step: int, state: State, data: Mapping[str, Any]) -> None:
        """Writes a state while the training goes on; the one before it goes when this is whole."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)), data=ocp.args.JsonSave(dict(data))
        )
        self._manager.save(step, args=args, force=True)

    def latest(self, state: State) -> tuple[State, Mapping[str, Any]] | None:
        """The state that was written last, as one like `state`, and that of the data; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)
        leaves = [found.state[name] for name in _named(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), found.data

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _named(state: State) -> dict[str, Any]:
    """The arrays of a state by where they are in it."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
