"""Forward KL on text that the teacher writes, and on one's own: what heals a pruned model.

jaxopt-llm distill --config=distill --teacher=smollm2-135m-instruct --student=out/pruned --out=out/healed
"""

from jaxopt_llm.distill import Distillation, Written


def config() -> Distillation:
    return Distillation(written=Written(sequences=32), steps=30)
