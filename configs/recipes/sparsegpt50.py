"""Half of the weights of the layers to zeros, the others changed to make up for it: SparseGPT, arXiv:2301.00774.

jaxopt-llm optimize --config=sparsegpt50 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-sparsegpt50
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="sparsegpt", sparsity=0.5),))
