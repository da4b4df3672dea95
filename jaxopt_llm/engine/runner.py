"""What the engine has on the device: parameters, state and programs, on one device or on a mesh.

On a mesh the whole step is the body of one `shard_map`: kernels see local arrays, and the model asks for each sum over
the tensor axis itself. Data shards each have slots and pages of their own, and inputs with one more leading dimension.
Where the model lies in stages of a pipeline, what follows is the last stage's, and `pipeline.Front` has the others.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxopt_llm.engine.config import EngineConfig
from jaxopt_llm.engine.drafting import levels
from jaxopt_llm.engine.layout import empty_counts, empty_state, on_each
from jaxopt_llm.engine.pipeline import Front, layers_of
from jaxopt_llm.engine.placed import Placed, devices_of, engine_mesh, platform_of
from jaxopt_llm.engine.program import Inputs, Out, Processor, Program
from jaxopt_llm.engine.speculative import Speculation
from jaxopt_llm.engine.step import joins, step
from jaxopt_llm.engine.timeline import Watch
from jaxopt_llm.models import ModelConfig, Transformer, stages
from jaxopt_llm.sharding.hosts import spanned


class Runner:
    """Runs steps.

    Args:
      model: on one device, or placed on a mesh of data, stage, expert and tensor axes.
      config: of the engine.
      processors: as `Program` has them.
      draft: a smaller model to draft with, placed as the model is; or None.
      consume: delete the models' arrays once they are packed.

    Raises:
      ValueError: for a mesh that splits another axis, a draft model that does not suit the model, or drafts across
        stages.
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
        *front, last = stages(model)
        self._layers = [layers_of(part) for part in (*front, last)]
        self._model_config, self._sizes = model.config, config.scheduler(model.config, stages=len(front) + 1)
        self._mesh = engine_mesh(last)
        if front and (draft or config.prompt_lookup):
            raise ValueError(
                f"drafts are not made across the {len(front) + 1} stages of a pipeline; drop the draft model or "
                "prompt_lookup, or take a mesh without `stage`"
            )
        speculation = _speculation(model.config, config) if draft or config.prompt_lookup else None
        if draft is not None and speculation is not None:
            _check_draft(draft.config, model.config, speculation)
            if engine_mesh(draft) != self._mesh:
                raise ValueError(
                    "the draft model lies on other devices than the model; load it with the same mesh"
                )
        dtype = config.kv_dtype(model.dtype)
        state = functools.partial(
            empty_state,
            model.config, self._sizes, dtype, self._mesh, platform_of(last),
            speculation=speculation, draft=draft.config if draft else None, layers=layers_of(last),
        )  # fmt: skip
        jax.eval_shape(on_each(self._mesh, state))  # what cannot be raises here, while the models are whole
        self._weights = Placed(last, consume=consume)
        self._front = Front(front, config, self._weights, consume=consume) if front else None
        self._draft_leaves: tuple[Array, ...] = ()
        if draft is not None and speculation is not None:
            placed = Placed(draft, consume=consume)
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
        self._state = self._weights.hold(state)
        self._processes = spanned(devices_of(model))
        self.watch: Watch | None = None  # told of each dispatch
        self._counts: tuple[Any, Any] = (None, None)  # seen and counts, which only full programs take

    @property
    def stages(self) -> int:
        """Of the pipeline; 1 where there is none."""
        return self._sizes.stages

    @property
    def shards(self) -> int:
        """Data shards: how many inputs a step takes."""
        return self._mesh.shape["data"] if self._mesh else 1

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the pages of all layers take for a token, over all tensor shards: scales and padding too."""
        parts = [*(self._front.caches if self._front else ()), self._state.cache]
        kinds = [[self._model_config.kind(layer) for layer in layers] for layers in self._layers]
        caches = list(zip(parts, kinds, strict=True))
        spec, memory = self._program.speculation, self._state.memory
        if spec and memory and memory.cache:
            caches.append((memory.cache, [spec.kind] * len(memory.cache)))
        copies = self.shards * (self._mesh.shape.get("expert", 1) if self._mesh else 1)
        tokens = lambda kind: copies * self._sizes.num_pages[kind] * self._sizes.page_size
        return sum(
            leaf.nbytes // tokens(kind)
            for cache, kinds in caches
            for pages, kind in zip(cache, kinds, strict=True)
            for leaf in jax.tree.leaves(pages)
        )

    def run(self, batches: Sequence[Inputs], *, steps: int, full: bool) -> Out:
        """One dispatch.

        Args:
          batches: of equal shapes, one for each data shard.
          steps, full: as `Program` has them.

        Returns:
          what it gives, for `read`; not waited for.
        """
        program = dataclasses.replace(self._program, steps=steps, full=full)
        state = self._state
        if full:
            seen, counts = self._no_counts() if self._counts[0] is None else self._counts
            state = dataclasses.replace(state, seen=seen, counts=counts)
        sent = time.perf_counter()
        given, outputs = self._front.run(batches) if self._front else (None, [])
        batch = self._weights.stack(batches)
        leaves = (self._weights.leaves, self._draft_leaves)
        if self._weights.here:
            out, state = step(leaves, state, batch, given, program=program)
        else:
            shapes, _ = jax.eval_shape(functools.partial(step, program=program), leaves, state, batch, given)
            out = self._weights.absent(shapes, self._joined)
        if self._front:
            self._front.take(batches, state.last_tokens)
        if self.watch is not None:
            fed = [inputs.tokens[: inputs.query_start[-1]] for inputs in batches]
            decodes = any(tokens.size for tokens in fed) and all((tokens < 0).all() for tokens in fed)
            self.watch.sent([*outputs, out.sampled.tokens], at=sent, decodes=decodes)
        if full:
            self._counts = state.seen, state.counts
        self._state = dataclasses.replace(state, seen=None, counts=None)
        return out

    def read(self, out: Out, *, whole: bool) -> list[Out]:
        """Waits for what a dispatch gave, and fetches it for each data shard: all if `whole`, or nothing of prompts."""
        wanted = out if whole else dataclasses.replace(out, target_logprob=None, best=None, hidden=None)
        if self._front and self._processes > 1:
            wanted = self._front.fetch(wanted, self._joined)
        fetched = jax.device_get(wanted)
        if self._mesh is None:
            return [fetched]
        return [jax.tree.map(lambda a, i=i: a[i], fetched) for i in range(self.shards)]

    def _joined(self, mesh: Mesh) -> P:
        """How a step's output is split over the last stage's mesh."""
        return P() if joins(mesh) else P("data")

    def update(self, model: Transformer) -> None:
        """Exchanges the weights for others of the same form.

        Raises:
          ValueError: if the model has other parts, shapes or dtypes, or lies elsewhere.
        """
        parts, own = stages(model), [*(self._front.weights if self._front else ()), self._weights]
        if len(parts) != len(own) or not all(
            placed.suits(part) for placed, part in zip(own, parts, strict=True)
        ):
            raise ValueError(
                "the model has other parts, shapes, dtypes or devices than the engine was made for; "
                "give one of the same config and dtype, loaded with the same mesh"
            )
        for placed, part in zip(own, parts, strict=True):
            placed.update(part)

    def _no_counts(self) -> tuple[Array, Array]:
        return self._weights.hold(functools.partial(empty_counts, self._model_config, self._sizes))


def _speculation(model: ModelConfig, config: EngineConfig) -> Speculation:
    windows = model.window_kinds
    reach = [window or model.max_seq_len for window in windows]
    kind = reach.index(max(reach))
    return Speculation(kind=kind, window=windows[kind], levels=levels(config.draft_tokens))


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
