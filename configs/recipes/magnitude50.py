"""The smaller half of every matrix of the layers to zeros: what the methods that look at activations are held against.

jaxopt-llm optimize --config=magnitude50 --out=out/smollm2-magnitude50

SmolLM2-135M made over so that it lies on no 4-bit grid, first four windows of 1,024 tokens of WikiText-2's test split:
perplexity 23.24 to 1,821.
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="magnitude", sparsity=0.5),))
