"""What the engine has on the device: parameters, state and programs, on one device or on a mesh.

On a mesh the whole step is the body of one `shard_map`: kernels see local arrays, and the model asks for each sum over
the tensor axis itself. Data shards each have slots and pages of their own, and inputs with one more leading dimension.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.placed import Placed
from jaxopt_llm.engine.program import Inputs, Out, Processor, Program, State
from jaxopt_llm.engine.speculative import Memory, Speculation
from jaxopt_llm.engine.step import HELD, step
from jaxopt_llm.models import Cache, ModelConfig, Transformer, init_cache


class Runner:
    """Runs steps.

    Args:
      model: on one device, or placed on a mesh of data and tensor axes.
      config: of the engine.
      processors: as `Program` has them.
      draft: a smaller model to draft with, placed as the model is; or None.
      consume: delete the models' arrays once they are packed.

    Raises:
      ValueError: for a mesh that splits another axis, or a draft model that does not suit the model.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        processors: Sequence[Processor] = (),
        *,
        draft: Transformer | None = None,
        consume: bool = False,
    ):
        self._sizes, self._cache_dtype = config.scheduler(model.config), config.kv_dtype(model.dtype)
        self._model_config, self._draft_config = model.config, draft.config if draft else None
        self._weights = Placed(model, consume=consume)
        self._mesh = self._weights.mesh
        self._draft_leaves: tuple[Array, ...] = ()
        speculation = _speculation(model.config) if draft or config.prompt_lookup else None
        if draft is not None and speculation is not None:
            _check_draft(draft.config, model.config, speculation)
            placed = Placed(draft, consume=consume)
            if placed.mesh != self._mesh:
                raise ValueError(
                    "the draft model lies on other devices than the model; load it with the same mesh"
                )
            self._draft_leaves = placed.leaves
            speculation = dataclasses.replace(speculation, draft=placed.skeleton)
        self._program = Program(
            skeleton=self._weights.skeleton,
            steps=1,
            full=False,
            processors=tuple(processors),
            speculation=speculation,
            mesh=self._mesh,
        )
        self._state = self._initial()
        self._counts: tuple[Any, Any] = (None, None)  # seen and counts, which only full programs take

    @property
    def shards(self) -> int:
        """Data shards: how many inputs a step takes."""
        return self._mesh.shape["data"] if self._mesh else 1

    def run(self, batches: Sequence[Inputs], *, steps: int, full: bool, drafts: int = 0) -> Out:
        """One dispatch.

        Args:
          batches: of equal shapes, one for each data shard.
          steps, full, drafts: as `Program` has them.

        Returns:
          what it gives, for `read`; not waited for.
        """
        program = dataclasses.replace(self._program, steps=steps, full=full, drafts=drafts)
        state = self._state
        if full:
            seen, counts = self._no_counts() if self._counts[0] is None else self._counts
            state = dataclasses.replace(state, seen=seen, counts=counts)
        batch = batches[0] if self._mesh is None else jax.tree.map(lambda *a: np.stack(a), *batches)
        out, state = step((self._weights.leaves, self._draft_leaves), state, batch, program=program)
        if full:
            self._counts = state.seen, state.counts
        self._state = dataclasses.replace(state, seen=None, counts=None)
        return out

    def read(self, out: Out, *, whole: bool) -> list[Out]:
        """Waits for what a dispatch gave, and fetches it for each data shard: all if `whole`, or nothing of prompts."""
        wanted = out if whole else dataclasses.replace(out, target_logprob=None, best=None, hidden=None)
        fetched = jax.device_get(wanted)
        if self._mesh is None:
            return [fetched]
        return [jax.tree.map(lambda a, i=i: a[i], fetched) for i in range(self.shards)]

    def update(self, model: Transformer) -> None:
        """As `Placed.update`."""
        self._weights.update(model)

    def _initial(self) -> State:
        config, sizes = self._model_config, self._sizes
        shards = self._mesh.shape["tensor"] if self._mesh else 1

        def pages(config: ModelConfig, counts: Sequence[int]) -> Cache:
            return init_cache(config, counts, sizes.page_size, self._cache_dtype, kernel=True, shards=shards)

        def body() -> State:
            return State(
                cache=pages(config, sizes.num_pages),
                last_tokens=jnp.zeros(sizes.max_slots, jnp.int32),
                memory=self._memory(pages),
            )

        return self._on_each(body)

    def _memory(self, pages: Callable[[ModelConfig, Sequence[int]], Cache]) -> Memory | None:
        spec, draft, sizes = self._program.speculation, self._draft_config, self._sizes
        if spec is None:
            return None
        count = sizes.num_pages[spec.kind]
        if draft is None:
            ids = jnp.zeros((count, sizes.page_size), jnp.int32)
            return Memory(ids=ids)
        return Memory(cache=pages(draft, [count] * len(draft.window_kinds)))

    def _no_counts(self) -> tuple[Array, Array]:
        shape = (self._sizes.max_slots, self._model_config.vocab_size)
        return self._on_each(lambda: (jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)))

    def _on_each(self, function: Any) -> Any:
        """What a function makes, on every device."""
        if self._mesh is None:
            # Committed, as what a step gives may be: else its second call would compile once more.
            return jax.device_put(function(), *self._weights.leaves[0].devices())
        return jax.jit(
            jax.shard_map(function, mesh=self._mesh, in_specs=(), out_specs=HELD, check_vma=False)
        )()


def _speculation(model: ModelConfig) -> Speculation:
    windows = model.window_kinds
    reach = [window or model.max_seq_len for window in windows]
    kind = reach.index(max(reach))
    return Speculation(kind=kind, window=windows[kind])


def _check_draft(draft: ModelConfig, model: ModelConfig, speculation: Speculation) -> None:
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {draft.vocab_size} and the model of {model.vocab_size}; "
            "take one with the same tokenizer"
        )
    if speculation.window is not None and any(
        window is None or window > speculation.window for window in draft.window_kinds
    ):
        raise ValueError(
            f"the model keeps its latest {speculation.window} tokens and the draft model looks back further; "
            "take one with windows as short, or prompt_lookup"
        )
