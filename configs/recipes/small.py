"""Prune, distil, int4 in one: as `prune70_distill`, then every matrix as in `int4`.

jaxopt-llm optimize --config=small --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-small
"""

from jaxopt_llm.distill import Distillation, Written
from jaxopt_llm.optimize import Distill, Prune, Quantize, Recipe


def config() -> Recipe:
    return Recipe(
        steps=(
            Prune(target_params=0.7, multiple=32),
            Distill(settings=Distillation(written=Written(sequences=128), steps=150)),
            Quantize(format="int4"),
        )
    )
