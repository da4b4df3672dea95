"""Ways to spread a model over devices, and what an engine on them must give."""

import numpy as np

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import Transformer, place
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests.engine import oracle

PLANS = (
    "tensor=2", "tensor=4", "tensor=8", "data=2", "data=2,tensor=4", "expert=4", "expert=4,tensor=2", "stage=2+1",
    "stage=2,tensor=4", "stage=3,tensor=2", "data=2,stage=1+2,tensor=2",
)  # fmt: skip
SIZES = EngineConfig(max_slots=4, max_seq_len=oracle.LENGTH, max_tokens_per_step=32, decode_steps=4)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def model_of(family: str) -> Transformer:
    """Three layers and eight heads that read two: what every plan divides, or shares."""
    return oracle.tiny(family, 3, num_heads=8, num_kv_heads=2)


def on(mesh: str, model: Transformer) -> Transformer:
    spec = MeshSpec.parse(mesh)
    return place(model, Sharding(spec.build(), model.config.units, stage_layers=spec.stage_layers))


def check(model: Transformer, mesh: str, quantize: str | None = None) -> None:
    """Prompts in chunks, and more of them than slots: each token is the plain forward's best, up to a tie."""
    model = jo.quantize(model, quantize) if quantize else model
    engine = Engine(on(mesh, model), None, SIZES)
    prompts = oracle.prompts(model.config.vocab_size, 40, 3, 17, 70, 9, 30)
    results = engine.generate(prompts, GREEDY)
    covered = [oracle.check_greedy(model, p, r.token_ids) for p, r in zip(prompts, results, strict=True)]
    assert np.mean(covered) > 6, covered
