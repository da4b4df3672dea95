"""`Sparsity`: which weights of a matrix become zero."""

import dataclasses
import re
from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A share of the weights, anywhere or evenly.

    Attributes:
      share: of the weights that become zero.
      group: so many weights that follow one another along a row have the share each; None: anywhere.
    """

    share: float
    group: int | None = None

    @classmethod
    def parse(cls, value: float | str) -> Self:
        """`0.5`: that share of zeros anywhere. `"2:4"`: two of every four stay, as sparse units of GPUs want it.

        Raises:
          ValueError: for anything else, a share outside (0, 1), or groups that lose nothing or everything.
        """
        text = str(value)
        if pattern := re.fullmatch(r"(\d+):(\d+)", text):
            stay, group = int(pattern[1]), int(pattern[2])
            if not 0 < stay < group:
                raise ValueError(
                    f"sparsity={text!r} must keep at least one and fewer than all of each {group}"
                )
            return cls(share=1 - stay / group, group=group)
        share = float(text) if re.fullmatch(r"-?\d*\.?\d+", text) else None
        if share is None or not 0 < share < 1:
            raise ValueError(
                f"sparsity={text!r} must be a share between 0 and 1, or how many of each group stay, such as 2:4"
            )
        return cls(share=share)

    def check(self, width: int, name: str) -> None:
        """Raises ValueError if rows of this width have no whole groups."""
        if self.group is not None and width % self.group:
            raise ValueError(f"{name} has {width} input features, which groups of {self.group} do not divide")

    def gone(self, scores: Float[Array, "O I"], *, rows: bool) -> Bool[Array, "O I"]:
        """Where the lowest scores stand: of each group, else of each row or (`rows` false) of the matrix."""
        width = self.group or (scores.shape[1] if rows else scores.size)
        return lowest(scores.reshape(-1, width), round(self.share * width)).reshape(scores.shape)


def lowest(scores: Float[Array, "n w"], count: int) -> Bool[Array, "n w"]:
    """Where the `count` lowest of each row stand; of equal ones, the first."""
    places = jnp.argsort(scores, axis=-1)[:, :count]
    return jnp.put_along_axis(jnp.zeros(scores.shape, bool), places, True, axis=-1, inplace=False)
