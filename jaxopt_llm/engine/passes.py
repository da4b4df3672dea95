"""One pass of the model inside a step: tokens in, the next ones out.

Letters as in `program`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxopt_llm.engine import speculative
from jaxopt_llm.engine.program import Extras, Inputs, Processor, Sampled, State
from jaxopt_llm.engine.sampling import TOP, RowSampling, penalize, sample
from jaxopt_llm.engine.speculative import Speculation
from jaxopt_llm.models import Batch, Transformer


def of_rows(values: Array, inputs: Inputs) -> Array:
    """What the slots of the rows hold."""
    return values.at[inputs.slots].get(mode="fill", fill_value=0)


def batch_of(inputs: Inputs) -> Batch:
    """What the model reads of a step."""
    return Batch(
        tokens=inputs.tokens,
        positions=inputs.positions,
        slots=inputs.rows,
        kv_len=inputs.kv_len,
        query_start=inputs.query_start,
        num_slots=inputs.num_rows,
        page_table=inputs.page_table,
    )


def forward(
    model: Transformer,
    draft: Transformer | None,
    state: State,
    inputs: Inputs,
    spec: Speculation | None,
    before: Float[Array, "T D"] | None = None,
) -> tuple[Float[Array, "T D"], State]:
    """Hidden states after the final norm; what is fed goes into the caches of the model and its draft.

    `before` are those that the stage before gives, where the model is the last stage of a pipeline.
    """
    batch = batch_of(inputs)
    hidden, cache = model.through(
        model.embedded(batch.tokens) if before is None else before, batch, state.cache
    )
    hidden = model.normed(hidden)
    memory = state.memory
    if spec is not None and memory is not None:
        memory = speculative.remember(spec, memory, batch)
        if draft is not None:
            memory = speculative.follow(spec, memory, draft, batch)
    return hidden, dataclasses.replace(_count(state, inputs), cache=cache, memory=memory)


def _count(state: State, inputs: Inputs) -> State:
    """Counts the tokens that are fed, so that what is recomputed after a preemption counts as it did before."""
    if inputs.extras is None or state.seen is None or state.counts is None:
        return state
    extras = inputs.extras
    fresh = jnp.zeros(state.seen.shape[0], bool).at[inputs.slots].set(extras.fresh, mode="drop")
    seen = state.seen & ~fresh[:, None]
    counts = jnp.where(fresh[:, None], 0, state.counts)
    slots = inputs.slots.at[inputs.rows].get(mode="fill", fill_value=seen.shape[0])
    generated = inputs.positions >= extras.prompt_len.at[inputs.rows].get(mode="clip")
    seen = seen.at[slots, inputs.tokens].max(~generated, mode="drop")
    counts = counts.at[slots, inputs.tokens].add(generated.astype(jnp.int32), mode="drop")
    return dataclasses.replace(state, seen=seen, counts=counts)


def latest(last_tokens: Int32[Array, "R"], inputs: Inputs) -> Inputs:
    """The inputs with the latest token of its slot in place of each -1."""
    last = of_rows(last_tokens, inputs)[inputs.rows]
    return dataclasses.replace(inputs, tokens=jnp.where(inputs.tokens < 0, last, inputs.tokens))


@jax.named_scope("sampling")
def choose(
    raw: Float[Array, "n V"],
    tokens: Int32[Array, "n"],
    positions: Int32[Array, "n"],
    sampling: RowSampling,
    state: State,
    inputs: Inputs,
    processors: tuple[Processor, ...],
) -> Sampled:
    """The next token for each row of the model's own scores, as settings say; in a full program there is one a row."""
    logits = raw
    if inputs.extras is not None:
        logits = _shift(logits, state, inputs)
    for processor in processors:
        logits = processor(logits, tokens, positions)
    chosen = sample(logits, sampling, positions)
    finite = jnp.all(jnp.isfinite(raw), axis=-1)
    if logits is not raw:  # a mask gives -inf, but to all tokens only together with a processor
        finite &= ~jnp.any(jnp.isnan(logits), axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)
    sampled = Sampled(tokens=chosen, finite=finite)
    return sampled if inputs.extras is None else _report(sampled, raw, inputs.extras)


def keep_last(state: State, inputs: Inputs, tokens: Int32[Array, "B"], which: Bool[Array, "B"]) -> State:
    """Notes the latest token of the slots of some rows."""
    target = jnp.where(which, inputs.slots, state.last_tokens.shape[0])
    return dataclasses.replace(state, last_tokens=state.last_tokens.at[target].set(tokens, mode="drop"))


def _shift(logits: Float[Array, "B V"], state: State, inputs: Inputs) -> Float[Array, "B V"]:
    """Penalties, biases, and -inf where the mask forbids a token."""
    extras, vocab = inputs.extras, logits.shape[1]
    assert extras is not None and state.seen is not None and state.counts is not None
    seen, counts = of_rows(state.seen, inputs), of_rows(state.counts, inputs)
    logits = penalize(logits, seen, counts, inputs.sampling)
    rows = jnp.arange(logits.shape[0])[:, None]
    place = jnp.where(extras.bias_ids < 0, vocab, extras.bias_ids)
    logits = logits.at[rows, place].add(extras.bias, mode="drop")
    ids = jnp.arange(vocab, dtype=jnp.uint32)
    allowed = extras.mask[:, ids // 32] >> (ids % 32)[None, :] & 1
    return jnp.where(allowed > 0, logits, -jnp.inf)


def _report(sampled: Sampled, logits: Float[Array, "B V"], extras: Extras) -> Sampled:
    """Log-probabilities, where a row wants them."""

    def compute() -> tuple[Array, Array, Array]:
        values = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(values, sampled.tokens[:, None], axis=1)[:, 0]
        top, ids = jax.lax.top_k(values, min(TOP, values.shape[1]))
        return chosen, ids.astype(jnp.int32), top

    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))
    logprob, ids, top = jax.lax.cond(extras.logprobs, compute, nothing)
    return dataclasses.replace(sampled, logprob=logprob, top_ids=ids, top_logprobs=top)
