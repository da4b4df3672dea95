"""Every matrix to int8 in groups of 32, activations rounded likewise on the fly: GGUF's Q8_0.

    jaxopt-llm optimize --config=int8_block --out=out/smollm2-int8-block

SmolLM2-135M: expect 538 MB to become 143 MB in memory, perplexity on the text that ships 45.73 to 45.90, KL divergence
0.0044, the same top token in 95.8 % of places (AMD EPYC Zen 4, 2 cores; jax 0.10.2).
"""

from jaxopt_llm.optimize import Quantize, Recipe


def config() -> Recipe:
    return Recipe(steps=(Quantize(format="int8_block"),))
