"""One step of the optimizer, a pure function under one `jax.jit`: XLA splits it where the models lie on a mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxopt_llm.distill import losses
from jaxopt_llm.distill.blocks import block_rows, summed
from jaxopt_llm.distill.config import Distillation, Optimizer
from jaxopt_llm.distill.losses import TopK
from jaxopt_llm.distill.student import Student
from jaxopt_llm.models import Batch, Transformer, as_run, capture
from jaxopt_llm.sharding import split_over

Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All that training changes.

    Attributes:
      step: steps done.
      student: its trained parameters.
      projections: of the student's hidden states to the teacher's, by the student's layer.
      moments: of the optimizer.
      mean: of the student's parameters over the steps, or None.
    """

    step: Int[Array, ""]
    student: dict[str, Array]
    projections: dict[str, Array]
    moments: Any
    mean: dict[str, Array] | None

    @property
    def best(self) -> dict[str, Array]:
        """The parameters to keep: their mean, where one is kept."""
        return self.student if self.mean is None else self.mean


class Trainer:
    """Runs steps.

    Args:
      student: apart.
      teacher: any model, quantized too; its parameters are not touched where it does not read along.
      config: settings.
      mesh: that both lie on, or None.
    """

    def __init__(
        self, student: Student, teacher: Transformer, config: Distillation, mesh: Mesh | None = None
    ):
        self.student, self.config, self.mesh = student, config, mesh
        self.loss, self.optimizer = config.loss, optimizer(config.optimizer, config.steps)
        self._widths = teacher.config.d_model, student.skeleton.config.d_model
        self._pairs = (
            _pairs(student.skeleton.config.num_layers, teacher.config.num_layers) if self.loss.hidden else {}
        )
        self._rows = block_rows(student.skeleton.config.vocab_size)
        self._teacher: Any = None
        self._teacher_params: Any = None
        if config.teacher_reads_along:
            self._teacher, self._teacher_params = nnx.split(as_run(teacher))
        self._update = jax.jit(self._step, donate_argnums=0)

    def start(self) -> State:
        """Before the first step, which gives the student's own arrays away: it can be had once."""
        params = self.student.params
        projections = {str(layer): jnp.eye(*self._widths, dtype=jnp.float32) for layer in self._pairs}
        return State(
            step=jnp.zeros((), jnp.int32),
            student=params,
            projections=projections,
            moments=self.optimizer.init((params, projections)),
            mean=None if self.config.optimizer.ema is None else jax.tree.map(jnp.copy, params),
        )

    def step(
        self,
        state: State,
        tokens: Int[Any, "A B T"],
        counted: Bool[Any, "A B T"],
        predicted: TopK | None = None,
    ) -> tuple[State, Metrics]:
        """The state after a step, and what it measured; the state before is given away.

        Where loss or gradient is not finite, nothing but the count changes.

        Args:
          state: before.
          tokens: windows of each of the forward passes.
          counted: whether the prediction at a position, of the token after it, is part of the loss.
          predicted: by the teacher at every position, where it read the windows before.
        """
        batches = (tokens, counted, predicted)
        if self.mesh is not None:
            batches = jax.device_put(batches, split_over(self.mesh, None, "data", "sequence"))
        return self._update(state, self.student.frozen, self._teacher_params, batches)

    def _step(self, state: State, frozen: Any, teacher: Any, batches: Any) -> tuple[State, Metrics]:
        params = (state.student, state.projections)
        gradient = jax.value_and_grad(self._objective, has_aux=True)
        measure = lambda batch: gradient(params, frozen, teacher, *batch)
        (loss, metrics), gradients = _mean(measure, batches)
        norm = optax.tree.norm(gradients)
        updates, moments = self.optimizer.update(gradients, state.moments, params)
        student, projections = optax.apply_updates(params, updates)
        ema = self.config.optimizer.ema
        mean = None
        if ema is not None:
            mean = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.mean, student)
        new = State(step=state.step, student=student, projections=projections, moments=moments, mean=mean)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return dataclasses.replace(kept, step=state.step + 1), {
            "loss": loss,
            **metrics,
            "gradient_norm": norm,
        }

    def _objective(
        self,
        params: Any,
        frozen: Any,
        teacher_params: Any,
        tokens: Array,
        counted: Array,
        predicted: TopK | None,
    ) -> tuple[Array, Metrics]:
        trained, projections = self.student.rounded(params[0]), params[1]
        weight = counted.reshape(-1).astype(jnp.float32)
        weight = weight / jnp.maximum(weight.sum(), 1)
        given: dict[str, Any] = {"target": jnp.roll(tokens, -1, axis=1).reshape(-1), "weight": weight}
        student = self.student.model(trained, frozen)
        hidden, states = _run(student, tokens, list(self._pairs))
        constants = {"frozen": frozen, "teacher": teacher_params}
        near = jnp.zeros((), jnp.float32)
        if predicted is not None:
            given["teacher"] = jax.tree.map(lambda x: x.reshape(tokens.size, *x.shape[2:]), predicted)
        elif self._teacher is not None:
            teacher = nnx.merge(self._teacher, teacher_params)
            given["teacher"], aims = _run(teacher, tokens, list(self._pairs.values()))
            for layer, (own, aim) in zip(projections, zip(states, aims, strict=True), strict=True):
                near = near + _distance(own, aim, projections[layer], weight) / len(projections)
        head = {name: value for name, value in trained.items() if self.student.in_head(name)}
        loss, metrics = summed(self._block, self._rows, head, hidden, given, constants)
        if self._pairs:
            metrics["hidden"] = near
        return loss + self.loss.hidden * near, metrics

    def _block(self, head: Any, hidden: Array, given: Any, constants: Any) -> tuple[Array, Metrics]:
        """The loss of some tokens: a `BlockLoss`."""
        scores = self.student.head(head, constants["frozen"]).logits(hidden)
        values = {"cross_entropy": losses.cross_entropy(scores, given["target"])}
        loss = self.loss.cross_entropy * values["cross_entropy"]
        if self.loss.compares_logits:
            teacher = given["teacher"]
            if self._teacher is not None:
                teacher = nnx.merge(self._teacher, constants["teacher"]).logits(teacher)
            values["divergence"] = self.loss.distance(teacher, scores)
            loss = loss + (1 - self.loss.cross_entropy) * values["divergence"]
        mean = lambda value: jnp.sum(given["weight"] * value)
        return mean(loss), {name: mean(value) for name, value in values.items()}


def optimizer(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW as `Optimizer` says."""
    adamw = optax.adamw(
        functools.partial(learning_rate, settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    return adamw if settings.clip is None else optax.chain(optax.clip_by_global_norm(settings.clip), adamw)


def learning_rate(settings: Optimizer, steps: int, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Of a step, counted from 0: a line up, then half a cosine down."""
    warmup = round(settings.warmup * steps)
    step = jnp.asarray(step).astype(jnp.float32)
    rise = jnp.minimum(1.0, (step + 1) / max(1, warmup))
    way = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    fall = settings.final + (1 - settings.final) * (1 + jnp.cos(math.pi * way)) / 2
    return settings.learning_rate * rise * fall


def _mean(function: Any, batches: Any) -> Any:
    """The mean of what a function gives for each of the batches."""
    count = jax.tree.leaves(batches)[0].shape[0]
    first = function(jax.tree.map(lambda x: x[0], batches))
    if count == 1:
        return first
    add = lambda total, batch: (jax.tree.map(jnp.add, total, function(batch)), None)
    total, _ = jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], batches))
    return jax.tree.map(lambda x: x / count, total)


def _run(model: Transformer, tokens: Int[Array, "B T"], layers: list[int]) -> tuple[Array, list[Array]]:
    """Hidden states after the final norm, `[B * T, D]`, and after these layers."""
    if not layers:
        return model.forward(Batch.dense(tokens), None)[0], []
    names = [f"layers.{layer}" for layer in layers]
    _, seen = capture(model, "final_norm", *names)(tokens)  # XLA drops the logits, which nobody reads
    flat = lambda name: seen[name].reshape(tokens.size, -1)
    return flat("final_norm"), [flat(name) for name in names]


def _pairs(student: int, teacher: int) -> dict[int, int]:
    """Each layer of the student, and the teacher's at the same depth; the last is compared by its logits."""
    return {layer: round((layer + 1) * teacher / student) - 1 for layer in range(student - 1)}


def _distance(own: Array, aim: Array, projection: Array, weight: Array) -> Array:
    """The mean square of what a projection misses, as a share of the teacher's own."""
    aim = jax.lax.stop_gradient(aim).astype(jnp.float32)
    missed = own.astype(jnp.float32) @ projection.T - aim
    square = lambda x: jnp.sum(weight * jnp.mean(x * x, axis=-1))
    return square(missed) / square(aim)
