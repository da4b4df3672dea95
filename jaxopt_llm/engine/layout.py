"""How parameters and state lie: on one device as they are, on a mesh each device its own part."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int32

from jaxopt_llm.engine.program import State, held, packed_over
from jaxopt_llm.engine.scheduler import SchedulerConfig
from jaxopt_llm.engine.skeleton import Skeleton
from jaxopt_llm.engine.speculative import Memory, Speculation
from jaxopt_llm.models import FUSIONS, ModelConfig, init_cache, packed

Packing = Callable[[tuple[Array, ...]], tuple[Skeleton, tuple[Array, ...]]]


def on_each(
    mesh: Mesh | None,
    body: Callable[..., Any],
    *,
    in_specs: Any = (),
    out_specs: Callable[[Mesh], PartitionSpec] = held,
) -> Any:
    """A function of local arrays on every device of a mesh; as it is where there is none."""
    if mesh is None:
        return body
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs(mesh), check_vma=False)


def packing(
    form: Skeleton,
    specs: Sequence[PartitionSpec],
    mesh: Mesh | None,
    platform: str,
    fuse: frozenset[str] = FUSIONS,
) -> Packing:
    """What packs the leaves of this form of model for a platform's kernels; on a mesh compiled once.

    Args:
      form: the canonical model.
      specs: of its leaves, on a mesh.
      mesh: that they lie on, or None for one device.
      platform: of the devices.
      fuse: as `packed` has it.
    """
    found: list[Skeleton] = []

    def body(*leaves: Array) -> tuple[Array, ...]:
        skeleton, parts = Skeleton.split(packed(form.fill(leaves), platform, fuse))
        found.append(skeleton)
        return parts

    pack = on_each(mesh, body, in_specs=tuple(specs), out_specs=packed_over)
    pack = pack if mesh is None else jax.jit(pack)

    def run(leaves: tuple[Array, ...]) -> tuple[Skeleton, tuple[Array, ...]]:
        parts = pack(*leaves)
        return found[0], parts

    return run


def empty_state(
    config: ModelConfig,
    sizes: SchedulerConfig,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    platform: str,
    *,
    speculation: Speculation | None = None,
    draft: ModelConfig | None = None,
    layers: range | None = None,
) -> State:
    """What one device keeps between steps, before the first.

    Args:
      config: of the model.
      sizes: slots and pages of a data shard.
      dtype: of keys and values.
      mesh: over whose tensor axis heads are split, or None.
      platform: of the devices.
      speculation: where drafts come from, or None.
      draft: of the draft model, if they come from one.
      layers: those of a stage of a pipeline; None for all.
    """
    pages = functools.partial(
        init_cache,
        page_size=sizes.page_size,
        dtype=dtype,
        kernel=True,
        shards=mesh.shape["tensor"] if mesh else 1,
        platform=platform,
    )
    memory = None
    if speculation is not None:
        count = sizes.num_pages[speculation.kind]
        if draft is None:
            memory = Memory(ids=jnp.zeros((count, sizes.page_size), jnp.int32))
        else:
            memory = Memory(cache=pages(draft, [count] * len(draft.window_kinds)))
    last = jnp.zeros(sizes.max_slots, jnp.int32)
    return State(cache=pages(config, sizes.num_pages, layers=layers), last_tokens=last, memory=memory)


def empty_counts(
    config: ModelConfig, sizes: SchedulerConfig
) -> tuple[Bool[Array, "R V"], Int32[Array, "R V"]]:
    """`State.seen` and `State.counts`, which only full programs take."""
    shape = (sizes.max_slots, config.vocab_size)
    return jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)
