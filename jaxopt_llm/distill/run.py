"""Distillation from beginning to end: what is read, the steps, what is kept on the way, what came of it."""

import dataclasses
import functools
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxopt_llm import checkpoints, evaluate
from jaxopt_llm.checkpoints.atomic import atomic_file
from jaxopt_llm.distill import log
from jaxopt_llm.distill.config import Distillation
from jaxopt_llm.distill.data import Ids, Windows, check_installed
from jaxopt_llm.distill.losses import TopK
from jaxopt_llm.distill.predictions import PREDICTIONS, Predictions
from jaxopt_llm.distill.snapshots import Snapshots
from jaxopt_llm.distill.step import State, Trainer, learning_rate
from jaxopt_llm.distill.student import Student
from jaxopt_llm.distill.writing import Author, write
from jaxopt_llm.engine.placed import delete
from jaxopt_llm.models import Transformer, mesh_of, weights
from jaxopt_llm.text import Tokenizer

_WRITTEN = "written.json"  # by the teacher

Progress = Callable[[str, int, int], None]
Told = Callable[[Mapping[str, Any]], None]


class Model(NamedTuple):
    """A model and its tokenizer, as `load` gives them."""

    model: Transformer
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a distillation.

    Attributes:
      model: the student; adapters are merged.
      adapters: the trained matrices A and B, where they were not asked to be merged; else None.
      loss: of the last step.
      tokens: of all windows read.
      perplexity_before, perplexity_after: of the student on the held-out text.
      teacher_perplexity: on the same text, by its own tokens.
      seconds: of writing, of what the teacher reads before, and of training since it was started, or resumed.
      tokens_per_s: of the steps in them, all told.
      peak_bytes: most memory that the process has held; on an accelerator, of the device.
    """

    model: Transformer
    adapters: Mapping[str, Any] | None
    loss: float
    tokens: int
    perplexity_before: float
    perplexity_after: float
    teacher_perplexity: float
    seconds: float
    tokens_per_s: float
    peak_bytes: int


def distill(
    teacher: Model,
    student: Model,
    config: Distillation,
    *,
    texts: Sequence[str],
    held_out: str,
    folder: Path,
    resume: bool = False,
    consume: bool = False,
    progress: Progress | None = None,
    told: Told | None = None,
) -> Outcome:
    """Trains a student to predict what its teacher predicts.

    Args:
      teacher: stays as it is, without `consume`.
      student: stays as it is; what is trained is a copy.
      config: settings.
      texts: to train on, beside what the teacher writes.
      held_out: to measure perplexity on, before and after.
      folder: for snapshots, metrics and plots. A run that was killed goes on from its last snapshot, bit by bit.
      resume: whether a run that is there is continued; else it is refused.
      consume: the teacher's arrays are deleted before training, but for the student's own, if it does not read along.
      progress: called with (stage, parts of it done, of all).
      told: called with what each step measured.

    Raises:
      ValueError: for models that do not go together, too little text, another run in the folder, or numbers that are
        not finite; the last good student is kept then. Without the extra `train`.
    """
    check_installed()
    stage = lambda name: functools.partial(progress or _ignore, name)
    _check(teacher, student, config)
    own = [_ids(student, text) for text in texts]
    held = {"teacher": _ids(teacher, held_out), "student": _ids(student, held_out)}
    measure = functools.partial(evaluate.perplexity, window=config.window, windows=config.windows)
    snapshots = Snapshots(folder, _identity(teacher, student, config, texts), resume=resume)
    try:
        start = time.perf_counter()
        sources = _sources(teacher, student, config, texts, own, folder, stage("the teacher writes"))
        windows = Windows(
            sources,
            batch=config.batch * config.accumulate,
            length=config.length,
            seed=config.seed,
            stride=1 if config.top_k is None else config.length,
        )
        predictions = None
        if config.top_k is not None:
            predictions = Predictions(
                folder,
                teacher.model,
                windows,
                batches=config.steps,
                batch=config.batch,
                k=config.top_k,
                progress=stage("the teacher reads"),
            )
        spent = time.perf_counter() - start
        reference = measure(teacher.model, held["teacher"], progress=stage("measuring the teacher"))
        before = measure(student.model, held["student"], progress=stage("measuring the student"))
        if consume and not config.teacher_reads_along:
            delete(jax.tree.leaves(weights(teacher.model)), kept=jax.tree.leaves(weights(student.model)))
        start = time.perf_counter()
        run = _Run(teacher.model, student, config, windows, predictions, snapshots, stage("distilling"), told)
        state, loss, steps = run.steps()
        spent += time.perf_counter() - start
    finally:
        snapshots.close()
    result = run.result(state)
    after = measure(result, held["student"], progress=stage("measuring the result"))
    a_step = config.batch * config.accumulate * config.length
    return Outcome(
        model=result,
        adapters=dict(state.best) if config.lora and not config.lora.merge else None,
        loss=loss,
        tokens=config.steps * a_step,
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        teacher_perplexity=reference.perplexity,
        seconds=spent,
        tokens_per_s=steps * a_step / spent,
        peak_bytes=peak_bytes(),
    )


def finish(folder: Path) -> None:
    """Once its student is saved, nothing of a run is of use to another; metrics and plots stay."""
    log.plot(folder)
    shutil.rmtree(folder / "snapshots", ignore_errors=True)
    for name in (PREDICTIONS, _WRITTEN, "run.json"):
        (folder / name).unlink(missing_ok=True)


def peak_bytes() -> int:
    """Most memory held so far: of the first device, or of the process where the device does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Run:
    """The steps of one run, from where they stand."""

    def __init__(
        self,
        teacher: Transformer,
        student: Model,
        config: Distillation,
        windows: Windows,
        predictions: Predictions | None,
        snapshots: Snapshots,
        progress: Callable[[int, int], None],
        told: Told | None,
    ):
        self._config, self._snapshots = config, snapshots
        self._windows, self._predictions = windows, predictions
        self._original, self._tokenizer = student
        self._student = Student.of(
            student.model,
            dtype=jnp.dtype(config.dtype),
            lora=config.lora,
            remat=config.remat,
            quantize=config.quantize,
            seed=config.seed,
        )
        self._trainer = Trainer(self._student, teacher, config, mesh_of(student.model))
        self._progress, self._told = progress, told
        self._author: Author | None = None

    def result(self, state: State) -> Transformer:
        """The student that a state holds, in its own dtype, or rounded."""
        return self._student.merged(state.best, self._original.dtype)

    def steps(self) -> tuple[State, float, int]:
        """The last state, its loss, and how many steps were taken."""
        state = self._trainer.start()
        found = self._snapshots.latest(state)
        if found is not None:
            state, self._windows.state = found
        first = int(state.step)
        metrics = log.Log(self._snapshots.folder, first)
        try:
            state = self._to_the_end(state, first, metrics)
        finally:
            metrics.close()
        return state, log.read(self._snapshots.folder)[-1]["loss"], self._config.steps - first

    def _to_the_end(self, state: State, first: int, metrics: log.Log) -> State:
        config = self._config
        data, batch = self._windows.state, self._batch(state, first)
        for step in range(first + 1, config.steps + 1):
            self._progress(step - 1, config.steps)
            begun = time.perf_counter()
            state, measured = self._trainer.step(state, *batch)
            data = self._windows.state
            if step < config.steps:  # while the device works
                batch = self._batch(state, step)
            row = {name: float(value) for name, value in measured.items()}
            if not np.isfinite(list(row.values())).all():
                raise ValueError(self._not_finite(state, step, row))
            rate = float(learning_rate(config.optimizer, config.steps, step - 1))
            row |= {"step": step, "learning_rate": rate, "seconds": time.perf_counter() - begun}
            metrics.add(row)
            if self._told:
                self._told(row)
            if step % config.save_every == 0 or step == config.steps:
                self._snapshots.save(step, state, data)
        self._progress(config.steps, config.steps)
        return state

    def _batch(
        self, state: State, step: int
    ) -> tuple[Int[np.ndarray, "A B T"], Bool[np.ndarray, "A B T"], TopK | None]:
        """The windows of the step after this one, which predictions count, and the teacher's where it read before."""
        config = self._config
        places = next(self._windows)
        tokens = self._windows.tokens(places)
        counted = np.ones(tokens.shape, bool)
        counted[:, -1] = False  # what follows the last token is not there
        draw = np.random.default_rng((config.seed, step))
        if config.on_policy and draw.random() < config.on_policy.share:
            student = self.result(dataclasses.replace(state, mean=None))
            if self._author is None:
                self._author = Author(student, config.on_policy, batch=len(tokens), length=config.length)
            tokens, counted = self._author.rewrite(student, tokens, seed=int(draw.integers(2**31)))
        predicted = None if self._predictions is None else self._predictions[places]
        split = lambda x: x.reshape(config.accumulate, config.batch, *x.shape[1:])
        return jax.tree.map(split, (tokens, counted, predicted))

    def _not_finite(self, state: State, step: int, row: Mapping[str, float]) -> str:
        name, value = next((name, value) for name, value in row.items() if not np.isfinite(value))
        place = self._snapshots.folder / "last_good"
        checkpoints.save(self.result(state), self._tokenizer, place)
        return (
            f"step {step}: {name} is {value}; the student as it was before is kept in {place}. "
            "Try a smaller optimizer.learning_rate, or dtype=float32"
        )


def _check(teacher: Model, student: Model, config: Distillation) -> None:
    for role, (model, tokenizer) in (("teacher", teacher), ("student", student)):
        if tokenizer is None:
            raise ValueError(f"the {role} has no tokenizer, and no text can be read without one")
        evaluate.check_sizes(window=config.window, context=model.config.max_seq_len)
        if config.length > model.config.max_seq_len:
            raise ValueError(
                f"length={config.length} is beyond the {role}'s context of {model.config.max_seq_len}"
            )
    sizes = [model.config.vocab_size for model, _ in (teacher, student)]
    same = sizes[0] == sizes[1] and _vocabulary(teacher) == _vocabulary(student)
    if config.needs_teacher and not same:
        raise ValueError(
            f"teacher and student have different vocabularies, of {sizes[0]} and {sizes[1]} tokens: neither logits nor "
            "hidden states can be compared. Learn from text that the teacher writes: loss.cross_entropy=1, "
            "loss.hidden=0 and written"
        )
    if config.top_k is not None and config.top_k > sizes[0]:
        raise ValueError(f"top_k={config.top_k} is more than the {sizes[0]} tokens of the vocabulary")
    mesh = mesh_of(student.model)
    data, sequence = (1, 1) if mesh is None else (mesh.shape.get(axis, 1) for axis in ("data", "sequence"))
    if config.batch % data:
        raise ValueError(f"batch={config.batch} must be a multiple of the mesh's data={data}")
    if sequence > 1 and (config.batch != data or config.length % sequence):
        raise ValueError(
            f"mesh sequence={sequence} splits one window on each data shard: batch={config.batch} must be {data}, and "
            f"length={config.length} a multiple of {sequence}; for larger batches accumulate"
        )


def _vocabulary(model: Model) -> dict[str, int]:
    return model.tokenizer.backend.get_vocab() if model.tokenizer else {}


def _ids(model: Model, text: str) -> Ids:
    assert model.tokenizer is not None, "checked"
    return np.asarray(model.tokenizer.encode(text, add_special=False), np.int32)


def _sources(
    teacher: Model,
    student: Model,
    config: Distillation,
    texts: Sequence[str],
    own: Sequence[Ids],
    folder: Path,
    progress: Callable[[int, int], None],
) -> list[tuple[Ids, float]]:
    """Token ids to take windows from, each with its share of them."""
    total = sum(map(len, own))
    share = config.written.share if config.written and own else 1.0 if config.written else 0.0
    sources = [(ids, (1 - share) * len(ids) / total) for ids in own if share < 1]
    if config.written:
        place = folder / _WRITTEN
        if not place.exists():
            beginnings = [_ids(teacher, text) for text in texts]
            sequences = write(teacher.model, config.written, beginnings, config.seed, progress)
            with atomic_file(place) as file:
                file.write(json.dumps(_in_tokens_of(student, teacher, sequences)).encode())
        sequences = json.loads(place.read_bytes())
        sources.append((np.concatenate([np.asarray(ids, np.int32) for ids in sequences]), share))
    if not sources:
        raise ValueError("there is nothing to train on: give texts, or let the teacher write some (written)")
    return sources


def _in_tokens_of(student: Model, teacher: Model, sequences: list[list[int]]) -> list[list[int]]:
    """What the teacher wrote, in the student's tokens."""
    if _vocabulary(student) == _vocabulary(teacher):
        return sequences
    assert teacher.tokenizer is not None, "checked"
    return [_ids(student, teacher.tokenizer.decode(ids)).tolist() for ids in sequences]


def _identity(teacher: Model, student: Model, config: Distillation, texts: Sequence[str]) -> dict[str, Any]:
    """What makes a run: as JSON, by the names that a user knows."""
    settings = _flat(dataclasses.asdict(config))
    models = {"teacher": teacher.model, "student": student.model}
    return settings | {
        "text": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12],
        **{role: json.loads(json.dumps(model.config.to_json())) for role, model in models.items()},
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _ignore(stage: str, done: int, total: int) -> None: ...
