"""The run-time type checker of the tests: beartype, taking a few things as mypy and JAX take them."""

import functools
import sys
from collections.abc import Callable
from typing import Self

import jax.numpy as jnp
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

_LIBRARIES = ("jax", "flax", "optax", "orbax")
_check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int is a float
        hint_overrides=FrozenDict(
            {
                Self: object,  # the import hook decorates methods one by one, and they have no Self
                np.dtype: np.dtype | type(jnp.float32),  # which JAX takes for a dtype
            }
        ),
    )
)


def check(function: Callable) -> Callable:
    """`function` with its annotations checked at each call.

    Except where a library rebuilds a dataclass: its fields may then be anything that `jax.tree.map` gave; and
    where a dataclass checks them itself, so that a test sees what a user sees.
    """
    checked = _check(function)
    if function.__name__ != "__init__":
        return checked

    @functools.wraps(function)
    def init(*args, **kwargs):
        own = hasattr(args[0], "__post_init__")
        return None if own or _caller() in _LIBRARIES else checked(*args, **kwargs)

    return init


def _caller() -> str:
    """The top-level package whose code constructs the object."""
    frame = sys._getframe(2)
    while (name := frame.f_globals["__name__"]) == __name__ or name.startswith(("beartype.", "jaxtyping.")):
        frame = frame.f_back
    return name.split(".")[0]
