"""On forced devices: data and tensor shards give the plain forward's tokens, for weights of every kind."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import Transformer, place
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests.engine import oracle

SIZES = EngineConfig(max_slots=2, max_seq_len=oracle.LENGTH, max_tokens_per_step=32, decode_steps=4)
MODELS = {
    "windows": lambda: oracle.tiny("gemma3_text"),  # and one key/value head for four shards
    "sinks": lambda: oracle.tiny("gpt_oss"),  # and experts, and two key/value heads
    "kernels": oracle.wide,
}


def on(mesh: str | jax.sharding.Mesh, model: Transformer) -> Transformer:
    built = MeshSpec.parse(mesh).build() if isinstance(mesh, str) else mesh
    return place(model, Sharding(built, model.config.units))


@pytest.mark.parametrize(
    ("name", "format", "mesh"),
    [
        ("windows", "int8", "tensor=4"),
        ("sinks", "int8", "data=2,tensor=4"),
        ("kernels", "int8_block", "data=2,tensor=4"),
        ("kernels", "int8", "data=2"),
    ],
)
def test_tokens(name, format, mesh):
    """Of quantized weights; `tests/models/test_params.py` has float ones of more families."""
    model = jo.quantize(MODELS[name](), format)
    engine = Engine(on(mesh, model), None, SIZES)
    prompts = oracle.prompts(model.config.vocab_size, 40, 3, 17, 70, 9)
    results = engine.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
    # In a random model one rounded activation that flips, as shards sum in another order, moves scores by 0.04.
    tie = 0.1 if format == "int8_block" else oracle.TIE
    covered = [
        oracle.check_greedy(model, p, r.token_ids, tie=tie) for p, r in zip(prompts, results, strict=True)
    ]
    assert np.mean(covered) > 6, covered


@pytest.fixture(scope="module")
def spread():
    return Engine(on("data=2,tensor=4", oracle.tiny("mistral")), None, SIZES)


def test_a_shard_without_work_does_not_hold_up_the_other(spread):
    """Sixteen tokens after the first, in dispatches of as many steps as one device takes."""
    sent = []
    run = spread._runner.run
    spread._runner.run = lambda batches, **options: sent.append(options["steps"]) or run(batches, **options)
    try:
        spread.generate(oracle.prompts(90, 20), SamplingParams(max_tokens=17, ignore_eos=True))
    finally:
        spread._runner.run = run
    assert sent[1:] == [spread.config.decode_steps] * -(-16 // spread.config.decode_steps)


def test_a_prompt_goes_where_its_prefix_is(spread):
    """As far as there is a free slot; the third goes to the shard that has one."""
    first, second = oracle.prompts(90, 50, 50, seed=11)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    spread.generate([first, second], params)
    found = spread.generate([second, first, second, second], params)
    assert [result.cached_tokens for result in found] == [48, 48, 48, 0]


def test_every_option(spread):
    """Two data shards share the work; sampling is the same on all tensor shards, and as on one device."""
    alone = Engine(oracle.tiny("mistral"), None, SIZES)
    prompts = oracle.prompts(90, 20, 5, 40, 33, 8)
    base = SamplingParams(max_tokens=10, ignore_eos=True)
    params = [
        base,
        dataclasses.replace(base, temperature=0.8, seed=3, top_k=10),
        dataclasses.replace(base, temperature=1.0, seed=3, repetition_penalty=1.3),
        dataclasses.replace(base, logit_bias={7: 5.0}, frequency_penalty=1.0),
        dataclasses.replace(base, logprobs=2),
    ]
    there, here = (engine.generate(prompts, params) for engine in (spread, alone))
    assert [r.token_ids for r in there] == [r.token_ids for r in here]
    for one, other in zip(there[4].logprobs, here[4].logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    for one, other in zip(spread.score(prompts), alone.score(prompts), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    np.testing.assert_allclose(spread.embed(prompts), alone.embed(prompts), atol=1e-4)
    even = lambda tokens: np.arange(97) % 2 == 0
    first, second = (engine.submit(prompts[0], base, allowed=even).result() for engine in (spread, alone))
    assert first.token_ids == second.token_ids


def test_programs_are_compiled_ahead(spread):
    spread.warm_up()
    spread.warm_up(full=True)
    with oracle.compilations() as seen:
        test = oracle.prompts(90, 60, 2, 31, seed=8)
        spread.generate(test, SamplingParams(max_tokens=9, temperature=1.0, seed=1))
        spread.generate(test[:1], SamplingParams(max_tokens=9, logprobs=3))
        spread.score(test)
        spread.embed(test[1:])
    assert seen == []


def test_a_mesh_of_one_axis_is_refused():
    mesh = jax.make_mesh(
        (2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    with pytest.raises(ValueError, match="the mesh has no axis data; build it with MeshSpec"):
        Engine(on(mesh, oracle.tiny("mistral")), None, SIZES)
