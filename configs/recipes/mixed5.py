"""A format for each matrix, int3 to int8, by what rounding it alone was measured to cost: 5 bits a parameter in all.

AWQ scales channels first, GPTQ rounds each matrix in the format it was given.

jaxopt-llm optimize --config=mixed5 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-mixed5
"""

from jaxopt_llm.optimize import Layerwise, Mixed, Recipe
from jaxopt_llm.quantize import AWQ


def config() -> Recipe:
    return Recipe(steps=(Layerwise(methods=(AWQ(round=False),), rest=None), Mixed(target_bits=5.0)))
