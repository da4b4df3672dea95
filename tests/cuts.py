"""What may be left of a model, by chance."""

import numpy as np

from jaxopt_llm.prune import Kept


def some(rng, size, count):
    return sorted(rng.choice(size, count, replace=False).tolist())


def kept_of(config, seed=0):
    """A random choice that cuts every axis: one layer, a third of the width, a head of each group, channels."""
    rng = np.random.default_rng(seed)
    group = config.num_heads // config.num_kv_heads
    layers = some(rng, config.num_layers, config.num_layers - 1)
    if group > 1:
        heads = lambda: [
            k * group + h for k in range(config.num_kv_heads) for h in some(rng, group, group - 1)
        ]
    else:  # whole key/value groups
        heads = lambda: some(rng, config.num_heads, config.num_heads - 1)
    rows = [heads() for _ in layers]
    width = config.d_model * 2 // 3
    return Kept(
        layers=layers,
        embed=some(rng, config.d_model, width - width % len(rows[0])),  # transformers 5 wants Gemma 3's so
        heads=rows,
        mlp=None if config.experts else [some(rng, config.d_ff, config.d_ff // 2) for _ in layers],
    )
