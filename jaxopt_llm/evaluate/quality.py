"""Quality of a model on a text: perplexity, and how far its predictions lie from a reference model's."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxopt_llm.evaluate.windows import Windows, cut
from jaxopt_llm.models import Batch, Transformer
from jaxopt_llm.text import Tokenizer

_LOGITS = 2**24  # held at once: 64 MB in float32

Ids = Sequence[int] | Int[np.ndarray, "n"]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
      perplexity: `exp` of the mean negative log-likelihood of a token.
      stderr: its standard error, from how windows differ; None for one window.
      bits_per_byte: the negative log-likelihood in bits over the UTF-8 bytes of the tokens, which compares
        models of different vocabularies; None where no tokenizer was given.
      tokens: predictions that counted.
      window_nll: mean negative log-likelihood of each window, nats a token.
    """

    perplexity: float
    stderr: float | None
    bits_per_byte: float | None
    tokens: int
    window_nll: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a model's predictions lie from a reference's: the figures of llama.cpp's `--kl-divergence`.

    Attributes:
      kld_mean: mean over tokens of KL(reference || model), nats.
      kld_stderr: its standard error, from how windows differ; None for one window.
      same_top_p: share of positions where both rank the same token first.
      perplexity, reference: of the model, of the reference.
    """

    kld_mean: float
    kld_stderr: float | None
    same_top_p: float
    perplexity: Perplexity
    reference: Perplexity


def perplexity(
    model: Transformer,
    ids: Ids,
    *,
    window: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of token ids, read in windows; nothing such as a BOS is added.

    Args:
      model: any model, quantized, on a mesh or neither.
      ids: of the whole text.
      window: tokens that the model reads at once; the first of each window is not predicted.
      stride: from one window to the next, tokens; below `window` they overlap, and each token counts once, in
        the first window that has it. None: no overlap.
      windows: only the first so many.
      tokenizer: counts the bytes for `bits_per_byte`.
      progress: called with (windows done, of all).

    Raises:
      ValueError: for fewer than two ids, one outside the vocabulary, or sizes that do not fit the context.
    """
    plan = _plan([model], ids, window=window, stride=stride, windows=windows)
    scores = _run([model], plan, progress)
    return _perplexity(scores.nll[0], plan, tokenizer)


def compare(
    model: Transformer,
    reference: Transformer,
    ids: Ids,
    *,
    window: int = 1024,
    stride: int | None = None,
    windows: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """How far `model` lies from `reference` on a text; the arguments are those of `perplexity`.

    Raises:
      ValueError: as `perplexity`, and for models with different vocabularies.
    """
    ours, theirs = model.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the model has a vocabulary of {ours} and the reference one of {theirs}; "
            "only models of one vocabulary can be compared token by token"
        )
    plan = _plan([model, reference], ids, window=window, stride=stride, windows=windows)
    scores = _run([model, reference], plan, progress)
    kld, stderr = _mean(scores.kld, plan.scored)
    return Comparison(
        kld_mean=kld,
        kld_stderr=stderr,
        same_top_p=_mean(scores.same_top, plan.scored)[0],
        perplexity=_perplexity(scores.nll[0], plan, tokenizer),
        reference=_perplexity(scores.nll[1], plan, tokenizer),
    )


def _plan(models: Sequence[Transformer], ids: Ids, **sizes: Any) -> Windows:
    config = min((model.config for model in models), key=lambda config: config.max_seq_len)
    if sizes["window"] > config.max_seq_len:
        raise ValueError(
            f"window={sizes['window']} is longer than the model's context of {config.max_seq_len}; "
            f"try window={config.max_seq_len}"
        )
    plan = cut(ids, **sizes)
    low, high = int(plan.tokens.min()), int(plan.tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} lies outside the vocabulary of {config.vocab_size}")
    return plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scores:
    """What each position gives; `kld` and `same_top` are None for one model alone."""

    nll: tuple[Float[Array, "*T"], ...]
    kld: Float[Array, "*T"] | None
    same_top: Bool[Array, "*T"] | None


def _run(models: Sequence[Transformer], plan: Windows, progress: Progress | None) -> _Scores:
    """Scores `[W, T]` on the host, a window at a time."""
    graphs, params = zip(*(nnx.split(model) for model in models), strict=True)
    rows = []
    for tokens in plan.tokens:
        rows.append(jax.device_get(_score(graphs, params, tokens)))
        if progress:
            progress(len(rows), len(plan.tokens))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


@functools.partial(jax.jit, static_argnums=0)
def _score(graphs: tuple[nnx.GraphDef, ...], params: tuple[Any, ...], tokens: Int[Array, "T"]) -> _Scores:
    """Each position's prediction of the token after it, by every model."""
    models = [nnx.merge(*parts) for parts in zip(graphs, params, strict=True)]
    hidden = tuple(model.forward(Batch.dense(tokens[None]), None)[0] for model in models)
    targets = jnp.roll(tokens, -1)

    def score(part: tuple[tuple[Array, ...], Array]) -> _Scores:
        hidden, targets = part
        logps = [jax.nn.log_softmax(model.logits(h)) for model, h in zip(models, hidden, strict=True)]
        nll = tuple(-jnp.take_along_axis(logp, targets[:, None], axis=1)[:, 0] for logp in logps)
        if len(models) == 1:
            return _Scores(nll=nll, kld=None, same_top=None)
        logp, reference = logps
        kld = jnp.sum(jnp.exp(reference) * (reference - logp), axis=-1)
        return _Scores(nll=nll, kld=kld, same_top=logp.argmax(-1) == reference.argmax(-1))

    return _in_chunks(score, (hidden, targets), max(1, _LOGITS // models[0].config.vocab_size))


def _in_chunks(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """`function` over `size` rows at a time, so that no intermediate is larger than they need."""
    rows = jax.tree.leaves(arrays)[0].shape[0]
    size = min(size, rows)
    chunks = -(-rows // size)
    pad = lambda x: jnp.pad(x, ((0, chunks * size - rows), *[(0, 0)] * (x.ndim - 1)))
    split = lambda x: pad(x).reshape(chunks, size, *x.shape[1:])
    join = lambda x: x.reshape(chunks * size, *x.shape[2:])[:rows]
    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, arrays)))


def _perplexity(nll: np.ndarray, plan: Windows, tokenizer: Tokenizer | None) -> Perplexity:
    mean, stderr = _mean(nll, plan.scored)
    value = math.exp(mean)
    bits = None
    if tokenizer is not None:
        size = len(tokenizer.to_bytes(plan.targets, skip_special=False))
        bits = mean * plan.scored.sum() / math.log(2) / size
    return Perplexity(
        perplexity=value,
        stderr=None if stderr is None else value * stderr,  # to first order
        bits_per_byte=bits,
        tokens=int(plan.scored.sum()),
        window_nll=tuple(float(row[counts].mean(dtype=np.float64)) for row, counts in zip(nll, plan.scored)),
    )


def _mean(values: np.ndarray, scored: np.ndarray) -> tuple[float, float | None]:
    """The mean over scored positions, and its standard error from the spread between windows.

    Neighbouring tokens are not independent draws, windows nearly are: the error is that of a ratio of sums over
    clusters (Cochran, Sampling Techniques, 1977, section 9A.1), a mean over windows of unequal lengths.
    """
    counts = scored.sum(1)
    sums = np.where(scored, values, 0).sum(1, dtype=np.float64)
    mean, n = sums.sum() / counts.sum(), len(counts)
    if n == 1:
        return float(mean), None
    spread = np.square(sums - mean * counts).sum() * n / (n - 1)
    return float(mean), float(math.sqrt(spread) / counts.sum())
