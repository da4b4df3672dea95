"""Every matrix to int8, one scale an output channel, activations float: the form that TPUs and GPUs run fast.

    jaxopt-llm optimize --config=int8 --out=out/smollm2-int8

SmolLM2-135M: expect 538 MB to become 135 MB in memory, perplexity on the text that ships 45.73 to 45.89, KL divergence
0.0041, the same top token in 95.6 % of places (AMD EPYC Zen 4, 2 cores; jax 0.10.2).
"""

from jaxopt_llm.optimize import Quantize, Recipe


def config() -> Recipe:
    return Recipe(steps=(Quantize(format="int8"),))
