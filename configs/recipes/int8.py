"""Every matrix to int8, one scale an output channel.

jaxopt-llm optimize --config=int8 --out=out/smollm2-int8
"""

from jaxopt_llm.optimize import Quantize, Recipe


def config() -> Recipe:
    return Recipe(steps=(Quantize(format="int8"),))
