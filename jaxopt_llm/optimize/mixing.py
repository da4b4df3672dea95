"""The step that gives each matrix a format of its own."""

import dataclasses
from pathlib import Path

from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Context
from jaxopt_llm.quantize import GPTQ, MIXED, check_rules, mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Rounds each matrix in the format that costs least within a budget: see `jaxopt_llm.quantize.mixed`.

    Attributes:
      target_bits: of everything that is stored, over the parameters.
      formats: to choose from, of weights alone.
      sequences: of the calibration text, that losses are measured on.
      gptq: how products are rounded, each in its own format; None rounds to nearest.
      sensitivities: file of what each matrix was measured to lose in each format, read where it is there and kept up to
        date: another budget needs no new pass.
    """

    target_bits: float = 5.0
    formats: tuple[str, ...] = MIXED
    sequences: int = 4
    gptq: GPTQ | None = GPTQ()
    sensitivities: Path | None = None

    def __post_init__(self):
        if not self.target_bits > 0:
            raise ValueError(f"target_bits={self.target_bits} must be above 0")
        if self.sequences < 1:
            raise ValueError(f"sequences={self.sequences} must be at least 1")
        if not self.formats:
            raise ValueError("formats is empty; give at least one, such as int8_g64")
        check_rules([(".*", format) for format in self.formats])

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        folder = context.folder
        return mixed(
            model,
            context.ids(),
            target_bits=self.target_bits,
            formats=self.formats,
            sequences=self.sequences,
            gptq=self.gptq,
            path=self.sensitivities or (folder and folder / "sensitivities.json"),
            directory=folder and folder / "layers",
            progress=context.progress,
        )
