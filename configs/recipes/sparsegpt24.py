"""Two of every four weights of the layers to zeros, as GPUs' sparse units want it; the others make up for it.

jaxopt-llm optimize --config=sparsegpt24 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-sparsegpt24
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="sparsegpt", sparsity="2:4"),))
