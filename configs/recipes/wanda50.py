"""Half of the weights of the layers to zeros, those that matter least to each output: Wanda, arXiv:2306.11695.

jaxopt-llm optimize --config=wanda50 --calibration=TRAIN.txt --text=TEST.txt --out=out/smollm2-wanda50

SmolLM2-135M made over so that it lies on no 4-bit grid, first four windows of 1,024 tokens of WikiText-2's test split:
perplexity 23.24 to 50.5, calibrated on 16 x 512 tokens of the train split.
"""

from jaxopt_llm.optimize import Recipe, Sparsify


def config() -> Recipe:
    return Recipe(steps=(Sparsify(method="wanda", sparsity=0.5),))
