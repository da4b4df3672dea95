"""Floor 6: a student learns what its teacher predicts."""

from jaxopt_llm.distill.config import Distillation, LoRA, OnPolicy, Optimizer, Written
from jaxopt_llm.distill.data import check_installed
from jaxopt_llm.distill.losses import Loss
from jaxopt_llm.distill.run import Model, Outcome, distill, finish
from jaxopt_llm.distill.student import Student

__all__ = [
    "Distillation",
    "LoRA",
    "Loss",
    "Model",
    "OnPolicy",
    "Optimizer",
    "Outcome",
    "Student",
    "Written",
    "check_installed",
    "distill",
    "finish",
]
