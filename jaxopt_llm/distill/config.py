"""What a distillation is: frozen settings, all checked before anything is loaded or computed."""

import dataclasses
import math
from typing import Any, Literal

from jaxopt_llm.distill.losses import Loss
from jaxopt_llm.evaluate import check_sizes
from jaxopt_llm.kernels import quantization_format


def _check(
    settings: Any, *, least: dict[str, float] | None = None, above: dict[str, float] | None = None
) -> None:
    for name, bound in (least or {}).items():
        if not bound <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {bound}")
    for name, bound in (above or {}).items():
        if not bound < getattr(settings, name) < math.inf:
            raise ValueError(f"{name}={getattr(settings, name)} must be above {bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv:1711.05101) with warm-up, a cosine, and clipping.

    Attributes:
      learning_rate: at its highest, after the warm-up.
      final: share of it that is left at the last step.
      warmup: share of the steps in which it rises to that.
      weight_decay: of matrices; norms and biases have none.
      b1, b2: of the means of gradients and of their squares.
      clip: longest gradient, over all parameters together; None for any.
      ema: how much of their mean over steps the parameters keep each step, as 0.999; the student is then the mean.
        None keeps none.
    """

    learning_rate: float = 3e-4
    final: float = 0.0
    warmup: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    clip: float | None = 1.0
    ema: float | None = None

    def __post_init__(self):
        _check(self, above={"learning_rate": 0}, least={"weight_decay": 0})
        for name in ("final", "warmup", "b1", "b2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1")
        if self.clip is not None:
            _check(self, above={"clip": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """Text that the teacher writes before training (sequence-level distillation, arXiv:1606.07947).

    Attributes:
      sequences: how many.
      tokens: of each at most, its beginning included.
      prompt: tokens that each takes from the texts as its beginning; without texts, or at 0, it has the model's own
        first token alone.
      temperature: 0 takes the likeliest token, 1 draws as the teacher predicts.
      share: of the windows, the rest come from the texts; without texts all do.
    """

    sequences: int = 64
    tokens: int = 256
    prompt: int = 0
    temperature: float = 1.0
    share: float = 0.5

    def __post_init__(self):
        _check(self, least={"sequences": 1, "tokens": 2, "prompt": 0, "temperature": 0})
        if self.prompt >= self.tokens:
            raise ValueError(f"prompt={self.prompt} leaves nothing to write of tokens={self.tokens}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Batches that the student writes itself, so that it learns where it goes wrong (GKD, arXiv:2306.13649).

    Attributes:
      share: of the batches, lambda in the paper.
      prompt: tokens of each window that are kept as the beginning; the loss is over what follows.
      temperature: of the student's sampling.
    """

    share: float = 0.5
    prompt: int = 32
    temperature: float = 1.0

    def __post_init__(self):
        _check(self, least={"prompt": 1, "temperature": 0})
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Adapters beside frozen weights, plain or quantized (arXiv:2106.09685).

    Attributes:
      rank: of each.
      alpha: their product is multiplied by `alpha / rank`.
      targets: last parts of the names of the layers' products that get one.
      merge: add them to the weights when saving, which must be floats then; else PEFT's format is written.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    merge: bool = False

    def __post_init__(self):
        _check(self, least={"rank": 1}, above={"alpha": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """What `distill` does.

    Attributes:
      loss: what the student learns from.
      optimizer: how.
      written: text of the teacher's, or None.
      on_policy: batches of the student's own text, or None.
      lora: train adapters in place of the weights.
      quantize: a format of `jaxopt_llm.quantize` that the student ends in: its matrices are rounded in every forward
        pass, so that it learns to make up for that (quantization-aware distillation); activations stay floats.
      top_k: tokens to keep of each of the teacher's predictions, the likeliest, with the share of all others as one.
        The teacher then reads every window that the run takes once, before training, and has no part in the steps.
        For windows to come again, they begin at multiples of their length alone. Until the run ends a token takes
        `6 * top_k + 4` bytes on disk (`8 * top_k + 4` for a vocabulary beyond 65,536). None: the teacher reads along.
      steps: of the optimizer.
      batch: windows a forward pass.
      accumulate: forward passes a step.
      length: tokens a window.
      dtype: of activations and products; parameters and optimizer stay float32.
      remat: keep only what each layer is given and compute its inside again for the gradients: less memory, a third
        more work.
      seed: of the order of the windows and of all sampling.
      save_every: steps from one snapshot to the next.
      window, windows: of the text that perplexity is measured on, before and after.
    """

    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    written: Written | None = None
    on_policy: OnPolicy | None = None
    lora: LoRA | None = None
    quantize: str | None = None
    top_k: int | None = None
    steps: int = 40
    batch: int = 4
    accumulate: int = 1
    length: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    seed: int = 0
    save_every: int = 50
    window: int = 512
    windows: int = 4

    def __post_init__(self):
        _check(self, least={"steps": 1, "batch": 1, "accumulate": 1, "length": 2, "seed": 0, "save_every": 1})
        check_sizes(window=self.window, windows=self.windows)
        if self.on_policy and self.on_policy.prompt >= self.length:
            raise ValueError(
                f"prompt={self.on_policy.prompt} leaves nothing to write of length={self.length}"
            )
        if self.on_policy and self.lora:
            raise ValueError(
                "on_policy samples from the student's weights, which lora leaves as they are; take one"
            )
        if self.quantize is not None:
            quantization_format(self.quantize)
        if self.quantize and self.lora:
            raise ValueError(
                f"quantize={self.quantize} rounds the weights that are trained, which lora leaves as they are; take one"
            )

        if self.top_k is not None:
            self._check_top_k()

    def _check_top_k(self) -> None:
        _check(self, least={"top_k": 1})
        kept = f"top_k={self.top_k} keeps the teacher's likeliest tokens on given text"
        if self.on_policy:
            raise ValueError(f"{kept}, and on_policy writes another; take one")
        if self.loss.hidden:
            raise ValueError(f"{kept}, no hidden states; set loss.hidden=0, not {self.loss.hidden}")
        if self.loss.divergence != "forward_kl":
            raise ValueError(
                f"{kept}, too few for divergence={self.loss.divergence}; set loss.divergence=forward_kl"
            )
        if self.loss.temperature != 1:
            raise ValueError(f"{kept} at temperature 1; set loss.temperature=1, not {self.loss.temperature}")
        if not self.loss.compares_logits:
            raise ValueError(f"{kept}, and loss.cross_entropy=1 needs none of them; leave top_k out")

    @property
    def needs_teacher(self) -> bool:
        """Whether what the teacher makes of a window is part of the loss."""
        return self.loss.compares_logits or self.loss.hidden > 0

    @property
    def teacher_reads_along(self) -> bool:
        """Whether the teacher reads every batch while the student trains."""
        return self.needs_teacher and self.top_k is None
