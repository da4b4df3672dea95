"""Every matrix to int4 in groups of 32 with a float minimum, activations to int8 on the fly: GGUF's Q4_1.

jaxopt-llm optimize --config=int4 --out=out/smollm2-int4
"""

from jaxopt_llm.optimize import Quantize, Recipe


def config() -> Recipe:
    return Recipe(steps=(Quantize(format="int4"),))
