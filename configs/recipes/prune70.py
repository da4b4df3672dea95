"""A dense model of 70 % of the parameters outside the embedding: fewer channels, fewer query heads in each group.

jaxopt-llm optimize --config=prune70 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-prune70
"""

from jaxopt_llm.optimize import Prune, Recipe


def config() -> Recipe:
    return Recipe(steps=(Prune(target_params=0.7),))
