"""Quality of a model on a text: perplexity, and how far its predictions lie from a reference model's."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxopt_llm.evaluate.estimate import Estimate, Interval
from jaxopt_llm.evaluate.windows import Ids, Windows, check_sizes, cut
from jaxopt_llm.models import Batch, Transformer, as_run, mesh_of, without_layers
from jaxopt_llm.sharding import split_over
from jaxopt_llm.text import Tokenizer

_LOGITS = 2**24  # of each model held at once: 64 MB in float32

Progress = Callable[[int, int], None]
_Read = Callable[[Int[np.ndarray, "T"]], Float[Any, "T D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      perplexity: `exp` of the mean negative log-likelihood of a token.
      stderr, interval: its standard error and 95 % confidence interval, from how windows differ; None for one window.
      bits_per_byte: the negative log-likelihood in bits over the UTF-8 bytes of the tokens, which compares
        models of different vocabularies; None where no tokenizer was given.
      bits_per_byte_interval: likewise.
      tokens: predictions that counted.
      window_nll: mean negative log-likelihood of a token in each window, nats.
    """

    perplexity: float
    stderr: float | None
    interval: Interval | None
    bits_per_byte: float | None
    bits_per_byte_interval: Interval | None
    tokens: int
    window_nll: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a model's predictions lie from a reference's: the figures of llama.cpp's `--kl-divergence`.

    Attributes:
      kld_mean: mean over tokens of KL(reference || model), nats.
      kld_stderr, kld_interval: its standard error and 95 % confidence interval, from how windows differ; None for one
        window.
      same_top_p: share of positions where both rank the same token first.
      same_top_stderr, same_top_interval: likewise.
      window_kld: mean of each window, nats.
      token_kld: of each prediction that counted, in the order of the text.
      perplexity, reference: of the model, of the reference.
    """

    kld_mean: float
    kld_stderr: float | None
    kld_interval: Interval | None
    same_top_p: float
    same_top_stderr: float | None
    same_top_interval: Interval | None
    window_kld: tuple[float, ...]
    token_kld: Float[np.ndarray, "n"]
    perplexity: Perplexity
    reference: Perplexity


class Reading(TypedDict, total=False):
    """How a text is read, and what is told meanwhile.

    Attributes:
      window: tokens that a model reads at once, 1,024 unless told; the first of each window is not predicted.
      stride: from one window to the next, tokens; below `window` they overlap, and each token counts once, in
        the first window that predicts it. None: no overlap.
      windows: only the first so many.
      bos: a token that takes the place of each window's first, as in llama.cpp; some models (Gemma) are lost
        without it. None: the text as it is.
      tokenizer: counts the bytes for `bits_per_byte`.
      progress: called with (windows done, of all).
    """

    window: int
    stride: int | None
    windows: int | None
    bos: int | None
    tokenizer: Tokenizer | None
    progress: Progress | None


def perplexity(model: Transformer, ids: Ids, **reading: Unpack[Reading]) -> Perplexity:
    """Perplexity of token ids, read in windows.

    Args:
      model: any model, quantized, on a mesh or neither.
      ids: of the whole text.
      **reading: as `Reading` has it.

    Raises:
      ValueError: for fewer than two ids, one outside the vocabulary, or sizes that do not fit the context.
    """
    _, _, (found,) = _measure([model], ids, **reading)
    return found


class Reference:
    """A model that others are compared with, over the same text: it reads each window once.

    What is kept is its hidden state before the head, `4 * d_model` bytes a token.

    Args:
      model: any.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._states: dict[bytes, Float[np.ndarray, "T D"]] = {}

    def reading(self, read: _Read) -> _Read:
        """The same as `read`, but each window once."""

        def known(tokens: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T D"]:
            key = tokens.tobytes()
            if key not in self._states:
                self._states[key] = np.asarray(read(tokens))
            return self._states[key]

        return known


def compare(
    model: Transformer, reference: Transformer | Reference, ids: Ids, **reading: Unpack[Reading]
) -> Comparison:
    """How far `model` lies from `reference` on a text, read as `Reading` has it.

    Raises:
      ValueError: as `perplexity`, and for models with different vocabularies.
    """
    ours, theirs = model.config.vocab_size, _whole(reference).config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the model has a vocabulary of {ours} tokens and the reference one of {theirs}; "
            "only models of one vocabulary can be compared token by token"
        )
    scores, plan, (own, other) = _measure([model, reference], ids, **reading)
    kld = _mean(scores.kld, plan).within(0, math.inf)
    same_top = _mean(scores.same_top, plan).within(0, 1)
    return Comparison(
        kld_mean=kld.value,
        kld_stderr=kld.stderr,
        kld_interval=kld.interval,
        same_top_p=same_top.value,
        same_top_stderr=same_top.stderr,
        same_top_interval=same_top.interval,
        window_kld=_window_means(scores.kld, plan),
        token_kld=scores.kld[plan.scored],
        perplexity=own,
        reference=other,
    )


def _measure(
    models: Sequence[Transformer | Reference],
    ids: Ids,
    *,
    window: int = 1024,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    **sizes: Any,
) -> tuple[Any, Windows, list[Perplexity]]:
    """`_Scores` of NumPy arrays `[W, T]`, the windows they are of, and each model's perplexity."""
    plan = _plan([_whole(model) for model in models], ids, window=window, **sizes)
    scores = _run(models, plan, progress)
    return scores, plan, [_perplexity(nll, plan, tokenizer) for nll in scores.nll]


def _plan(models: Sequence[Transformer], ids: Ids, *, window: int, **sizes: Any) -> Windows:
    context, vocab = (min(getattr(m.config, name) for m in models) for name in ("max_seq_len", "vocab_size"))
    check_sizes(window=window, context=context)
    for mesh in filter(None, map(mesh_of, models)):
        shards = mesh.shape.get("sequence", 1)
        if window % shards:
            raise ValueError(f"mesh sequence={shards} does not divide {window=}; take a multiple of it")
    plan = cut(ids, window=window, **sizes)
    outside = plan.tokens[(plan.tokens < 0) | (plan.tokens >= vocab)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} lies outside the vocabulary of {vocab}")
    return plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores:
    """What each position's prediction gives; `kld` and `same_top` are None for one model alone."""

    nll: tuple[Float[Array, "*T"], ...]
    kld: Float[Array, "*T"] | None
    same_top: Bool[Array, "*T"] | None


def _whole(model: Transformer | Reference) -> Transformer:
    return model.model if isinstance(model, Reference) else model


def _run(models: Sequence[Transformer | Reference], plan: Windows, progress: Progress | None) -> Any:
    """`_Scores` of NumPy arrays `[W, T]`, a window at a time."""
    readers = [_reader(model) for model in models]
    graphs, heads = zip(*(nnx.split(as_run(without_layers(_whole(model)))) for model in models), strict=True)
    rows: list[_Scores] = []
    for tokens in plan.tokens:
        hidden = tuple(read(tokens) for read in readers)
        rows.append(jax.device_get(_score(graphs, heads, hidden, tokens)))
        if progress:
            progress(len(rows), len(plan.tokens))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def _reader(model: Transformer | Reference) -> _Read:
    """What gives the hidden states of a window before the head; the model is packed when the first is read."""
    parts = functools.cache(lambda: nnx.split(as_run(_whole(model))))
    mesh = mesh_of(_whole(model))
    placed = lambda tokens: tokens if mesh is None else jax.device_put(tokens, split_over(mesh, "sequence"))
    read = lambda tokens: _hidden(*parts(), placed(tokens))
    return model.reading(read) if isinstance(model, Reference) else read


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: nnx.GraphDef, params: Any, tokens: Int[Array, "T"]) -> Float[Array, "T D"]:
    return nnx.merge(graph, params).forward(Batch.dense(tokens[None]), None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphs: tuple[nnx.GraphDef, ...],
    heads: tuple[Any, ...],
    hidden: tuple[Float[Any, "T D"], ...],
    tokens: Int[Array, "T"],
) -> _Scores:
    """Each position's prediction of the token after it, by every model's head."""
    models = [nnx.merge(*parts) for parts in zip(graphs, heads, strict=True)]

    def score(part: tuple[tuple[Array, ...], Array]) -> _Scores:
        hidden, targets = part
        logps = [jax.nn.log_softmax(model.logits(x)) for model, x in zip(models, hidden, strict=True)]
        nll = tuple(-jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0] for logp in logps)
        if len(models) == 1:
            return _Scores(nll=nll, kld=None, same_top=None)
        ours, reference = logps
        kld = jnp.sum(jnp.exp(reference) * (reference - ours), axis=-1)
        return _Scores(nll=nll, kld=kld, same_top=ours.argmax(-1) == reference.argmax(-1))

    rows = max(1, _LOGITS // models[0].config.vocab_size)
    return _in_chunks(score, (hidden, jnp.roll(tokens, -1)), rows)


def _in_chunks(function: Callable[[Any], Any], arrays: Any, rows: int) -> Any:
    """A function of rows, over `rows` of them at a time: no `[T, V]` ever exists."""
    length = jax.tree.leaves(arrays)[0].shape[0]
    rows = min(rows, length)
    chunks = -(-length // rows)
    pad = lambda x: jnp.pad(x, [(0, chunks * rows - length), *[(0, 0)] * (x.ndim - 1)])
    split = lambda x: pad(x).reshape(chunks, rows, *x.shape[1:])
    join = lambda x: x.reshape(chunks * rows, *x.shape[2:])[:length]
    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, arrays)))


def _perplexity(nll: np.ndarray, plan: Windows, tokenizer: Tokenizer | None) -> Perplexity:
    found = _mean(nll, plan).exp()
    bits = None if tokenizer is None else _bits_per_byte(nll, plan, tokenizer)
    return Perplexity(
        perplexity=found.value,
        stderr=found.stderr,
        interval=found.interval,
        bits_per_byte=None if bits is None else bits.value,
        bits_per_byte_interval=None if bits is None else bits.interval,
        tokens=int(plan.scored.sum()),
        window_nll=_window_means(nll, plan),
    )


def _bits_per_byte(nll: np.ndarray, plan: Windows, tokenizer: Tokenizer) -> Estimate:
    sizes = [len(tokenizer.to_bytes(targets, skip_special=False)) for targets in plan.window_targets]
    return Estimate.ratio(_window_sums(nll, plan) / math.log(2), np.array(sizes))


def _mean(values: np.ndarray, plan: Windows) -> Estimate:
    """Over the positions that count."""
    return Estimate.ratio(_window_sums(values, plan), plan.scored.sum(1))


def _window_means(values: np.ndarray, plan: Windows) -> tuple[float, ...]:
    return tuple(map(float, _window_sums(values, plan) / plan.scored.sum(1)))


def _window_sums(values: np.ndarray, plan: Windows) -> Float[np.ndarray, "W"]:
    return np.where(plan.scored, values, 0).sum(1, dtype=np.float64)
