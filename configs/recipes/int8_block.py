"""Every matrix to int8_block, x.

jaxopt-llm optimize --config=int8_block --out=out/smollm2-int8_block
"""

from jaxopt_llm.optimize import Quantize, Recipe


def config() -> Recipe:
    return Recipe(steps=(Quantize(format="int8_block"),))
