"""The smaller half of every matrix of the layers to zeros: what the methods that look at activations are held against.

jaxopt-llm optimize --config=magnitude50 --out=out/smollm2-magnitude50
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="magnitude", sparsity=0.5),))
