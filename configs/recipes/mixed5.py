"""A format for each matrix, int3 to int8, by what rounding it alone was measured to cost: 5 bits a parameter in all.

jaxopt-llm optimize --config=mixed5 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-mixed5
"""

from jaxopt_llm.optimize import Mixed, Recipe


def config() -> Recipe:
    return Recipe(steps=(Mixed(target_bits=5.0),))
