"""The step that gives each matrix a format of its own."""

import dataclasses
from pathlib import Path

from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Context
from jaxopt_llm.quantize import MIXED, check_rules, mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Rounds each matrix in the format that costs least within a budget: see `jaxopt_llm.quantize.mixed`.

    Attributes:
      target_bits: of everything that is stored, over the parameters.
      formats: to choose from, of weights alone.
      sensitivities: file of what each matrix was measured to lose in each format, read where it is there and kept up to
        date: another budget needs no new pass.
    """

    target_bits: float = 5.0
    formats: tuple[str, ...] = MIXED
    sensitivities: Path | None = None

    def __post_init__(self):
        if not self.target_bits > 0:
            raise ValueError(f"target_bits={self.target_bits} must be above 0")
        if not self.formats:
            raise ValueError("formats is empty; give at least one, such as int8_g64")
        check_rules([(".*", format) for format in self.formats])

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        kept = context.folder and context.folder / "sensitivities.json"
        return mixed(
            model,
            context.ids(),
            target_bits=self.target_bits,
            formats=self.formats,
            path=self.sensitivities or kept,
            progress=context.progress,
        )
