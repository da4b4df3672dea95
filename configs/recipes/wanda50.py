"""Half of the weights of the layers to zeros, those that matter least to each output: Wanda, arXiv:2306.11695.

jaxopt-llm optimize --config=wanda50 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-wanda50
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="wanda", sparsity=0.5),))
