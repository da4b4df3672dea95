"""Stages of a pipeline on forced devices give the plain forward's tokens, and one device's."""

import dataclasses
import itertools

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, SamplingParams
from tests.engine import oracle, plans
from tests.engine.plans import GREEDY, SIZES, on


@pytest.mark.parametrize(
    ("family", "format", "mesh"),
    [
        ("gemma3_text", None, "stage=2+1"),  # windows in some layers, and a head that is the embedding
        ("gpt_oss", "int8", "stage=1+2,expert=2,tensor=2"),
    ],
)
def test_tokens(family, format, mesh):
    plans.check(oracle.tiny(family, 3), mesh, format)


def test_stages_by_themselves_change_nothing():
    """Also where activations are rounded: every sum is the same."""
    model = jo.quantize(oracle.tiny("mistral", 3, d_model=64, d_ff=128, head_dim=32), "int4")
    prompts = oracle.prompts(90, 40, 3, 17, 70, 9, 30)
    engines = [Engine(one, None, SIZES) for one in (on("data=2,stage=2+1", model), model)]
    there, here = (engine.generate(prompts, GREEDY) for engine in engines)
    assert [r.token_ids for r in there] == [r.token_ids for r in here]


@pytest.fixture(scope="module")
def alone():
    return Engine(oracle.tiny("mistral", 3), None, SIZES)


@pytest.fixture(scope="module")
def staged():
    return Engine(on("stage=2+1,tensor=2", oracle.tiny("mistral", 3)), None, SIZES)


def test_micro_batches_follow_each_other(staged):
    """Of four requests two take part in a dispatch, while the other two are in the one before."""
    sent = []
    run = staged._runner.run
    staged._runner.run = lambda batches, **options: sent.append(batches[0]) or run(batches, **options)
    try:
        staged.generate(oracle.prompts(90, 5, 6, 7, 8, seed=3), GREEDY)
    finally:
        staged._runner.run = run
    rows = [set(inputs.slots[: int(inputs.num_rows)].tolist()) for inputs in sent if len(inputs.tokens) < 4]
    assert [len(slots) for slots in rows[:20]] == [2] * 20  # at the end those that are left share again
    assert not any(one & other for one, other in itertools.pairwise(rows))


def test_every_option(staged, alone):
    prompts = oracle.prompts(90, 20, 5, 40, 33, 8)
    params = [
        GREEDY,
        dataclasses.replace(GREEDY, temperature=0.8, seed=3, top_k=10),
        dataclasses.replace(GREEDY, temperature=1.0, seed=3, repetition_penalty=1.3),
        dataclasses.replace(GREEDY, logit_bias={7: 5.0}, frequency_penalty=1.0),
        dataclasses.replace(GREEDY, logprobs=2),
    ]
    there, here = (engine.generate(prompts, params) for engine in (staged, alone))
    assert [r.token_ids for r in there] == [r.token_ids for r in here]
    for one, other in zip(staged.score(prompts), alone.score(prompts), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    np.testing.assert_allclose(staged.embed(prompts), alone.embed(prompts), atol=1e-4)
    even = lambda tokens: np.arange(97) % 2 == 0
    first, second = (engine.submit(prompts[0], GREEDY, allowed=even).result() for engine in (staged, alone))
    assert first.token_ids == second.token_ids


def test_prefixes_are_shared_and_pages_run_out(alone):
    """Preempted requests go on as they would have; what was computed once is found by later ones."""
    tight = dataclasses.replace(SIZES, cache_tokens=oracle.LENGTH)
    engine = Engine(on("stage=1+2", oracle.tiny("mistral", 3)), None, tight)
    prompts = oracle.prompts(90, 20, 8, 5, 12, seed=5)
    params = dataclasses.replace(GREEDY, max_tokens=40)
    there, here = (one.generate(prompts, params) for one in (engine, alone))
    assert [r.token_ids for r in there] == [r.token_ids for r in here]
    assert engine.metrics().preemptions > 0
    _, again = (engine.generate(prompts[:1], params)[0] for _ in range(2))
    assert again.token_ids == here[0].token_ids and again.cached_tokens > 0


def test_programs_are_compiled_ahead(staged):
    staged.warm_up()
    staged.warm_up(full=True)
    with oracle.compilations() as seen:
        test = oracle.prompts(90, 60, 2, 31, seed=8)
        staged.generate(test, SamplingParams(max_tokens=9, temperature=1.0, seed=1))
        staged.score(test)
    assert seen == []


def test_weights_are_exchanged_in_all_stages_or_none(alone):
    model = oracle.tiny("mistral", 3)
    engine = Engine(on("stage=2+1", oracle.tiny("mistral", 3, norm_eps=1e-2)), None, SIZES)
    with pytest.raises(ValueError, match="other parts, shapes, dtypes or devices"):
        engine.update(on("stage=1+2", model))
    with pytest.raises(ValueError, match="other parts, shapes, dtypes or devices"):
        engine.update(model)
    changed = jo.models.with_weights(
        model, {"layers.0.mlp.up.weight": 0 * model.layers[0].mlp.up.weight.get_value()}
    )
    engine = Engine(on("stage=2+1", changed), None, SIZES)
    prompt = oracle.prompts(90, 9)
    before = engine.generate(prompt, GREEDY)[0].token_ids
    engine.update(on("stage=2+1", model))
    after = engine.generate(prompt, GREEDY)[0].token_ids
    assert after == alone.generate(prompt, GREEDY)[0].token_ids != before


def test_drafts_across_stages_are_refused():
    model = on("stage=2+1", oracle.tiny("mistral", 3))
    with pytest.raises(
        ValueError, match="drafts are not made across the 2 stages of a pipeline; drop the draft"
    ):
        Engine(model, None, dataclasses.replace(SIZES, prompt_lookup=True))
