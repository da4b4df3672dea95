"""What is made of logits that are never held of more than a block of tokens: a loss, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# What a block gives: its loss, and values to report beside it.
BlockLoss = Callable[[Any, Array, Any, Any], tuple[Array, Any]]

_LOGITS = 2**24  # of each model held at once: 64 MB in float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(
    loss: BlockLoss, rows: int, head: Any, hidden: Float[Array, "T D"], given: Any, constants: Any
) -> tuple[Float[Array, ""], Any]:
    """The sum of `loss(head, hidden[block], given[block], constants)` over blocks of `rows` tokens, and of its values.

    Gradients reach `head` and `hidden`. They are made beside the loss, block by block, where the logits are still at
    hand (as in Liger's fused cross-entropy, arXiv:2410.10989): with a vocabulary of 49k the head is a third of a
    small model's work, and `jax.checkpoint` would do its product a second time.

    Args:
      loss: a sum over the block; padding, which is 0 in everything given, must add nothing.
      rows: tokens a block.
      head: a pytree of the parameters of the head that are trained.
      hidden: of the student.
      given: a pytree of what else each token has: targets, weights, the teacher's hidden states.
      constants: a pytree of what all tokens share.
    """

    def add(total: Any, block: tuple[Array, Any]) -> tuple[Any, None]:
        return _add(total, loss(head, *block, constants)), None

    blocks = _blocks((hidden, given), rows)
    start = _zeros(loss, head, *jax.tree.map(lambda x: x[0], blocks), constants)
    return jax.lax.scan(add, start, blocks)[0]


def _forward(
    loss: BlockLoss, rows: int, head: Any, hidden: Array, given: Any, constants: Any
) -> tuple[tuple[Array, Any], tuple[Any, Array]]:
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def add(total: Any, block: tuple[Array, Any]) -> tuple[Any, Array]:
        found, (of_head, of_hidden) = gradient(head, *block, constants)
        return _add(total, (found, of_head)), of_hidden

    blocks = _blocks((hidden, given), rows)
    first = jax.tree.map(lambda x: x[0], blocks)
    start = _zeros(loss, head, *first, constants), jax.tree.map(jnp.zeros_like, head)
    (found, of_head), of_hidden = jax.lax.scan(add, start, blocks)
    return found, (of_head, _joined(of_hidden, hidden.shape[0]))


def _backward(
    loss: BlockLoss, rows: int, gradients: tuple[Any, Array], cotangent: tuple[Array, Any]
) -> tuple[Any, Array, None, None]:
    scale = lambda x: x * cotangent[0].astype(x.dtype)
    of_head, of_hidden = jax.tree.map(scale, gradients)
    return of_head, of_hidden, None, None


summed.defvjp(_forward, _backward)


def block_rows(vocab_size: int) -> int:
    """Tokens a block."""
    return max(1, _LOGITS // vocab_size)


def mapped(function: Callable[[Any], Any], rows: int, arrays: Any) -> Any:
    """`function(arrays)`, each of whose rows depends on the same row alone, over blocks of `rows` tokens."""
    length = jax.tree.leaves(arrays)[0].shape[0]
    found = jax.lax.map(function, _blocks(arrays, rows))
    return jax.tree.map(lambda x: _joined(x, length), found)


def _blocks(arrays: Any, rows: int) -> Any:
    """`[blocks, rows, ...]` of `[T, ...]`, padded with zeros.

    A block takes every so-many-th token: where tokens are split over devices, each device then has its share of every
    block, and none waits while others work.
    """
    length = jax.tree.leaves(arrays)[0].shape[0]
    rows = min(rows, length)
    count = -(-length // rows)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, count * rows - length), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(rows, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, arrays)


def _joined(blocks: Array, length: int) -> Array:
    """The inverse of `_blocks`."""
    return blocks.swapaxes(0, 1).reshape(-1, *blocks.shape[2:])[:length]


def _zeros(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros of what the function gives."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)
