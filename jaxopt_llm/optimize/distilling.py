"""The step that trains what other steps left, with the original as its teacher."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

from jaxopt_llm.distill import Distillation, Model, check_installed, distill
from jaxopt_llm.models import Transformer
from jaxopt_llm.optimize.context import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Trains the model to predict what the original predicts: see `jaxopt_llm.distill`. Needs the extra `train`.

    It learns from the calibration text, and from what the original writes where the settings say so (`written`).

    Attributes:
      settings: of the distillation.
    """

    settings: Distillation = Distillation()

    def __post_init__(self):
        check_installed()

    def __call__(self, model: Transformer, context: Context) -> Transformer:
        if context.calibration is None and self.settings.written is None:
            raise ValueError(
                "there is no text to distil on: give a calibration text, or let the original write some "
                "(settings.written)"
            )
        with contextlib.ExitStack() as stack:
            folder = context.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            outcome = distill(
                Model(context.original, context.tokenizer),
                Model(model, context.tokenizer),
                self.settings,
                texts=[] if context.calibration is None else [context.calibration],
                held_out=context.held_out,
                folder=folder,
                resume=True,
                progress=context.stages,
            )
        return outcome.model
