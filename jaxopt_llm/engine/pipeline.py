"""The stages of a pipeline before the last: tokens in, hidden states out, each on devices of its own.

What a pipeline buys is memory, not latency: a token still passes every layer one after another. Nothing here waits, so
that a stage is at one micro-batch while the next stage is at the one before; the scheduler forms them.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.layout import empty_state
from jaxopt_llm.engine.passes import batch_of, latest
from jaxopt_llm.engine.placed import Placed
from jaxopt_llm.engine.program import Inputs, held, packed_over
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.models import Cache, Transformer


class Front:
    """All stages but the last.

    Args:
      parts: of the model, as `models.stages` has them.
      config: of the engine.
      last: the last stage's weights.
      consume: as `Placed` has it.

    Attributes:
      weights: of each stage.
      caches: pages of each stage's layers.
    """

    def __init__(self, parts: Sequence[Transformer], config: EngineConfig, last: Placed, *, consume: bool):
        model = parts[0].config
        sizes = config.scheduler(model, stages=len(parts) + 1)
        self.weights = [Placed(part, consume=consume) for part in parts]
        self._programs = [
            _Stage(skeleton=placed.skeleton, mesh=placed.mesh, first=placed is self.weights[0])
            for placed in self.weights
        ]
        states = [
            placed.hold(
                functools.partial(
                    empty_state, model, sizes, config.kv_dtype(part.dtype), placed.mesh, placed.platform,
                    layers=layers_of(part),
                )
            )
            for placed, part in zip(self.weights, parts, strict=True)
        ]  # fmt: skip
        self._width, self._dtype = model.d_model, parts[0].dtype
        self.caches: list[Cache] = [state.cache for state in states]
        self._targets = [placed.where(lambda _: P("data")) for placed in [*self.weights[1:], last]]
        self._last, self._dispatches = last, 0
        # The latest tokens of all slots after each of the last dispatches, and which of them gave each slot its own.
        self._tokens = deque([(0, states[0].last_tokens)], maxlen=sizes.in_flight)
        shards = self.weights[0].mesh.shape["data"] if self.weights[0].mesh else 1
        # One slot more than there are, of rows that are padding.
        self._given_by = np.zeros((shards, sizes.max_slots + 1), np.int64)

    def run(self, batches: Sequence[Inputs]) -> tuple[Float[Array, "..."], list[Float[Array, "..."]]]:
        """Hidden states for the last stage, where it has them, and those that each stage gave; not waited for.

        Args:
          batches: of each data shard, as `Runner.run` has them.
        """
        outputs = []
        given = self._latest_tokens(batches)
        batch = self.weights[0].stack([dataclasses.replace(inputs, extras=None) for inputs in batches])
        for i, (placed, program, target) in enumerate(
            zip(self.weights, self._programs, self._targets, strict=True)
        ):
            if placed.here:
                hidden, self.caches[i] = _advance(placed.leaves, self.caches[i], batch, given, stage=program)
            else:
                shape = (*batch.tokens.shape, self._width)
                hidden = placed.absent(jax.ShapeDtypeStruct(shape, self._dtype), lambda _: P("data"))
            given = jax.device_put(hidden, target)
            outputs.append(hidden)
        return given, outputs

    def take(self, batches: Sequence[Inputs], last_tokens: Int32[Array, "..."]) -> None:
        """Takes in what the last stage has of a dispatch: the first stage's next tokens."""
        self._dispatches += 1
        for given_by, inputs in zip(self._given_by, batches, strict=True):
            given_by[inputs.slots[inputs.limit > 0]] = self._dispatches
        # The next step is given the array itself. It is fetched when a stage needs it: processes that wait for many
        # things of each other have no thread left to give any.
        kept = jnp.copy(last_tokens) if self._last.here else last_tokens
        self._tokens.append((self._dispatches, kept))

    def _latest_tokens(self, batches: Sequence[Inputs]) -> Int32[Array, "..."]:
        """Of the dispatch that gave the last of the tokens that are fed here: to wait for a later one takes longer."""
        given = [
            given_by[inputs.slots[inputs.rows[inputs.tokens < 0]]]
            for given_by, inputs in zip(self._given_by, batches, strict=True)
        ]
        number = max((int(numbers.max()) for numbers in given if numbers.size), default=0)
        tokens = next(tokens for dispatch, tokens in self._tokens if dispatch >= number)
        return jax.device_put(tokens, self.weights[0].where(held))

    def fetch(self, out: Any, spec: Callable[[Mesh], P]) -> Any:
        """What the last stage gives, split like this, where this process can read it.

        Every process makes every transfer, in the same order.
        """
        copies = [jax.device_put(out, placed.where(spec)) for placed in self.weights]
        found = [copy for placed, copy in zip(self.weights, copies, strict=True) if placed.here]
        return out if self._last.here else found[0]


def layers_of(part: Transformer) -> range:
    """Which of the model's layers a stage has."""
    return range(part.first_layer, part.first_layer + len(part.layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    """What a stage is compiled for, beside the shapes of its arguments.

    Attributes:
      skeleton: its part of the model.
      mesh: of its devices, or None for one.
      first: whether it takes tokens.
    """

    skeleton: Skeleton
    mesh: Mesh | None
    first: bool


@functools.partial(jax.jit, static_argnames="stage", donate_argnames="cache")
def _advance(
    leaves: tuple[Array, ...], cache: Cache, inputs: Inputs, given: Array, *, stage: _Stage
) -> tuple[Array, Cache]:
    """The hidden states that a stage gives, on a mesh with a leading dimension, the data shard; and its cache.

    Args:
      leaves: parameters.
      cache: donated.
      inputs: what the host decides.
      given: to the first stage the latest token of each slot, to another what the stage before it gave.
      stage: static.
    """
    if stage.mesh is None:
        return _through(leaves, cache, inputs, given, stage)

    def body(leaves: Any, cache: Cache, inputs: Inputs, given: Array) -> tuple[Array, Cache]:
        inputs = jax.tree.map(lambda a: a[0], inputs)
        hidden, cache = _through(leaves, cache, inputs, given if stage.first else given[0], stage)
        return hidden[None], cache

    own = held(stage.mesh)
    return jax.shard_map(
        body,
        mesh=stage.mesh,
        in_specs=(packed_over(stage.mesh), own, P("data"), own if stage.first else P("data")),
        out_specs=(P("data"), own),
        check_vma=False,  # every tensor shard has the same hidden states, which JAX cannot know
    )(leaves, cache, inputs, given)


def _through(
    leaves: tuple[Array, ...], cache: Cache, inputs: Inputs, given: Array, stage: _Stage
) -> tuple[Float[Array, "T D"], Cache]:
    part = stage.skeleton.fill(leaves)
    hidden = part.embedded(latest(given, inputs).tokens) if stage.first else given
    return part.through(hidden, batch_of(inputs), cache)
