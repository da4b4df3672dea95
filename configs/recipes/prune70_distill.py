"""70 % of the parameters outside the embedding, then trained to predict what the original predicts.

jaxopt-llm optimize --config=prune70_distill --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-prune70-distill
"""

from jaxopt_llm.distill import Distillation, Written
from jaxopt_llm.optimize import Distill, Prune, Recipe


def config() -> Recipe:
    return Recipe(
        steps=(
            Prune(target_params=0.7),
            Distill(settings=Distillation(written=Written(sequences=128), steps=150)),
        )
    )
