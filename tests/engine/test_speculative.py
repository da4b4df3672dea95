"""Speculation: the same tokens in fewer rounds, for prompt lookup and draft models, greedy and sampled."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams, drafting, speculative
from jaxopt_llm.engine.drafting import Drafting, Gain
from jaxopt_llm.engine.sampling import RowSampling
from jaxopt_llm.engine.speculative import Drafts, Layout, Rows, Speculation, Tally
from jaxopt_llm.models import place, weights, with_weights
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests.engine import oracle

SIZES = EngineConfig(
    max_slots=2, max_seq_len=oracle.LENGTH, max_tokens_per_step=32, decode_steps=8, draft_tokens=3
)
LOOKUP = dataclasses.replace(SIZES, prompt_lookup=True)
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
CYCLE = 7


@pytest.fixture(autouse=True)
def every_draft_pays(monkeypatch):
    """So that how busy the machine is does not decide what is tested."""
    monkeypatch.setattr(Drafting, "level", lambda self, records, rows: self.levels[-1])


def cyclic(model):
    """A model that goes round in circles of seven tokens, more or less."""
    values = dict(weights(model))
    values = {
        name: value * 0.2 if name.endswith(("attention.o.weight", "mlp.down.weight")) else value
        for name, value in values.items()
    }
    if "head.weight" in values:
        ids = np.arange(model.config.vocab_size)
        after = np.where(ids % CYCLE == CYCLE - 1, ids - CYCLE + 1, np.minimum(ids + 1, len(ids) - 1))
        values["head.weight"] = jnp.zeros_like(values["head.weight"]).at[after].add(values["embed.weight"])
    return with_weights(model, values)


def nearly(model, noise):
    """A model of much the same opinion."""
    rng = np.random.default_rng(7)
    disturb = lambda value: (
        value + jnp.asarray(noise * np.std(value) * rng.normal(size=value.shape), value.dtype)
    )
    return with_weights(model, {name: disturb(value) for name, value in weights(model).items()})


MODELS = {
    "llama": lambda: cyclic(oracle.tiny("llama")),  # pages in jax.numpy
    "windows": lambda: cyclic(oracle.tiny("gemma3_text")),
    "int8_block": lambda: jo.quantize(cyclic(oracle.wide()), "int8_block"),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, prompts, settings, and the tokens without speculation."""
    model = MODELS[request.param]()
    prompts = oracle.prompts(90, 40, 11, 25, 4)
    params = [dataclasses.replace(GREEDY, temperature=t, seed=i) for i, t in enumerate([0, 0.3, 1.0, 0])]
    return model, prompts, params, Engine(model, None, SIZES).generate(prompts, params)


def check_same(case, engine):
    _, prompts, params, expected = case
    results = engine.generate(prompts, params)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    return engine.metrics()


def test_prompt_lookup(case):
    metrics = check_same(case, Engine(case[0], None, LOOKUP))
    assert metrics.accepted > 10


@pytest.mark.parametrize("case", ["llama", "int8_block"], indirect=True)
def test_draft_model(case):
    draft = nearly(cyclic(oracle.tiny("llama") if case[0].config.head_dim < 32 else oracle.wide()), 0.1)
    metrics = check_same(case, Engine(case[0], None, SIZES, draft=draft))
    assert metrics.accepted > metrics.drafted / 4 > 5


def test_stop_tokens_among_drafts():
    model = MODELS["llama"]()
    model.config = dataclasses.replace(model.config, eos_ids=(12, 30, 47))
    prompts = oracle.prompts(90, 40, 11, 25, 4)
    params = SamplingParams(max_tokens=30)
    plain, found = (Engine(model, None, sizes).generate(prompts, params) for sizes in (SIZES, LOOKUP))
    assert [(r.token_ids, r.finish_reason) for r in plain] == [(r.token_ids, r.finish_reason) for r in found]
    assert {r.finish_reason for r in found} == {"stop", "length"}


@pytest.mark.parametrize("mesh", ["data=2,tensor=2"])
def test_on_a_mesh(mesh):
    built = MeshSpec.parse(mesh).build()
    on = lambda model: place(model, Sharding(built, model.config.units))
    model = cyclic(oracle.wide())
    prompts = oracle.prompts(90, 40, 11, 25)
    plain, looked, drafted = (
        Engine(on(model), None, sizes, draft=draft)
        for sizes, draft in ((SIZES, None), (LOOKUP, None), (SIZES, on(nearly(model, 0.1))))
    )
    expected = [r.token_ids for r in plain.generate(prompts, GREEDY)]
    for engine in (looked, drafted):
        assert [r.token_ids for r in engine.generate(prompts, GREEDY)] == expected
        assert engine.metrics().accepted > 10


def test_the_distribution_is_the_models():
    """Of a third token, drafted by a model that is often wrong: against the sum over all seconds, by chi-square."""
    model = oracle.wide()
    vocab, (prompt,) = model.config.vocab_size, oracle.prompts(90, 9)
    after = np.exp(oracle.logprobs(model, prompt))[-1].astype(np.float64)
    second = np.stack([np.exp(oracle.logprobs(model, [*prompt, token]))[-1] for token in range(vocab)])
    expected = after @ second.astype(np.float64)
    engine = Engine(model, None, SIZES, draft=nearly(model, 0.3))
    params = SamplingParams(max_tokens=4, temperature=1.0, ignore_eos=True)
    counts = np.zeros(vocab)
    for seed in range(0, 1200, 2):
        pair = [dataclasses.replace(params, seed=seed + i) for i in range(2)]
        for result in engine.generate([prompt, prompt], pair):
            counts[result.token_ids[1]] += 1
    metrics = engine.metrics()
    assert 0.1 < metrics.accepted / metrics.drafted < 0.9
    order = np.argsort(expected)
    groups = np.searchsorted(np.cumsum(expected[order]), np.linspace(0, 1, 13)[1:-1])
    bins = lambda values: np.array([part.sum() for part in np.split(values[order], groups)])
    assert scipy.stats.chisquare(bins(counts), bins(expected / expected.sum() * counts.sum())).pvalue > 1e-3


def test_what_does_not_go_together_is_refused():
    model = oracle.tiny("llama")
    with pytest.raises(ValueError, match="a draft model or prompt_lookup=True, not both"):
        Engine(model, None, LOOKUP, draft=model)
    with pytest.raises(ValueError, match=r"vocabulary of 96 and the model of .* the same tokenizer"):
        Engine(model, None, SIZES, draft=oracle.wide())
    windows = oracle.tiny("mistral")
    with pytest.raises(
        ValueError, match=r"keeps its latest .* tokens and the draft model looks back further"
    ):
        Engine(windows, None, SIZES, draft=oracle.tiny("llama", vocab_size=windows.config.vocab_size))
    with pytest.raises(ValueError, match="decode_steps=1 leaves no room for drafts"):
        Engine(model, None, dataclasses.replace(LOOKUP, decode_steps=1))
    with pytest.raises(ValueError, match="draft_tokens=0 must be a whole number of at least 1"):
        EngineConfig(draft_tokens=0)


def rows_of(latest, positions, left, page_table):
    count = len(latest)
    sampling = RowSampling.stack([SamplingParams()] * count, [0] * count)
    array = lambda values: jnp.asarray(values, jnp.int32)
    return Rows(
        tokens=array(latest), positions=array(positions), left=array(left),
        page_table=array(page_table), sampling=sampling,
    )  # fmt: skip


def found_in(sequence, most, window):
    """The definition: the latest of the longest matches of 4, 3, 2 tokens, and what came after it, round and round."""
    first = 0 if window is None else max(0, len(sequence) - window)
    for length in (4, 3, 2):
        for end in range(len(sequence) - 1, max(first, length - 1), -1):
            if sequence[end - length : end] == sequence[-length:] and end - 1 >= first:
                after = sequence[end:]
                return length, [after[i % len(after)] for i in range(most)]
    return 0, None


@pytest.mark.parametrize("window", [None, 10])
def test_lookup_finds_what_its_definition_says(window):
    rng = np.random.default_rng(0)
    spec = Speculation(kind=0, window=window, levels=(0, 2, 5))
    found = 0
    for _ in range(60):
        lengths = rng.integers(1, 30, 3)
        sequences = [rng.integers(0, 3, n).tolist() for n in lengths]
        pages = rng.permutation(24).reshape(3, 8)
        ids = np.full((24, 4), 1, np.int32)  # others' tokens
        for table, sequence in zip(pages, sequences, strict=True):
            for at, token in enumerate(sequence[:-1]):
                ids[table[at // 4], at % 4] = token
        rows = rows_of([s[-1] for s in sequences], lengths - 1, [9] * 3, pages)
        drafts = speculative.look_up(spec, jnp.asarray(ids), rows, jnp.int32(5))
        for row, sequence in enumerate(sequences):
            length, tokens = found_in(sequence, 5, window)
            assert int(drafts.count[row]) == (5 if length else 0)
            if length:
                found += 1
                assert drafts.tokens[row].tolist() == tokens
    assert found > 90


def test_drafts_lie_behind_their_row_and_are_accepted_up_to_the_first_wrong_one():
    rows = rows_of([10, 20, 30], [5, 0, 7], [9, 0, 2], [[0]] * 3)
    tokens = jnp.asarray([[11, 12, 13], [21, 22, 23], [31, 32, 33]], jnp.int32)
    count = jnp.asarray([3, 0, 1], jnp.int32)
    drafts = Drafts(tokens=tokens, count=count)
    layout = Layout.of(rows, drafts)
    assert layout.tokens[:7].tolist() == [10, 11, 12, 13, 20, 30, 31]
    assert layout.rows.tolist() == [0, 0, 0, 0, 3, 2, 2, *[3] * 5], "one that is through is padding"
    assert layout.start.tolist() == [0, 4, 5, 7]
    assert (layout.offset[:7]).tolist() == [0, 1, 2, 3, 0, 0, 1]
    sampled = layout.by_row(jnp.asarray([11, 12, 0, 14, 0, 31, 32, *[0] * 5], jnp.int32), 3)
    right = speculative.accepted(sampled, drafts)
    assert right.tolist() == [2, 0, 1]
    tally = Tally.empty(3).add(drafts, right)
    assert [tally.drafted.sum(), tally.accepted.sum(), *tally.tested.tolist()] == [4, 3, 3, 0, 1]


@pytest.mark.parametrize("level", [1, 3, 7])
def test_host_plays_the_rounds_that_lookup_would_have_made(monkeypatch, level):
    """Against the definition, over sequences that repeat themselves."""
    monkeypatch.setattr(drafting, "_KEPT_TOKEN", 1.0)
    rng = np.random.default_rng(level)
    shorter = 0
    for _ in range(20):
        passage = rng.integers(0, 6, 30).tolist()
        prompt, text = (
            passage[:20],
            [*rng.integers(0, 6, 3).tolist(), *passage, *rng.integers(0, 3, 20).tolist()],
        )
        record = drafting.LookedUp(prompt, [level])
        for part in (text[:7], text[7:8], text[8:]):
            record.take(part, None)
        at = rounds = drafted = 0
        drafts: list[int] = []  # of the first token none, as before it nothing was decoded
        while at < len(text):
            right = 0
            while right < len(drafts) and text[at + right : at + right + 1] == [drafts[right]]:
                right += 1
            at, rounds = at + right + 1, rounds + (at + right < len(text))  # the last may not be over
            drafts = found_in(prompt + text[:at], level, None)[1] or []
            drafted += bool(drafts) and at <= len(text)
        assert record.gain(level) == pytest.approx((len(text) / rounds, drafted / rounds))
        shorter += rounds < len(text)
    assert shorter > 15


@pytest.mark.parametrize(
    ("gains", "seconds", "level"),
    [
        ({3: Gain(3.9, 1.0), 7: Gain(7.2, 1.0)}, (1, 1.2, 1.4), 7),
        ({3: Gain(3.9, 1.0), 7: Gain(7.2, 1.0)}, (1, 1.2, 5.0), 3),
        ({3: Gain(3.9, 1.0), 7: Gain(7.2, 1.0)}, (1, 4.0, 8.0), 0),
        ({3: Gain(1.2, 1.0), 7: Gain(1.3, 1.0)}, (1, 1.3, 1.4), 0),
        ({3: Gain(1.2, 0.1), 7: Gain(1.3, 0.1)}, (1, 2.5, 3.9), 3),
        ({3: Gain(1.0, 0.0), 7: Gain(1.0, 0.0)}, (1, 1.0, 1.0), 0),
    ],
)
def test_as_many_drafts_as_pay(monkeypatch, gains, seconds, level):
    monkeypatch.undo()
    chooser = Drafting(7, model=False)
    record = chooser.record([])
    record.gain = gains.get
    assert chooser.level([record], 1) == 0, "what rounds take is not known"
    for each, time in zip(chooser.levels, seconds, strict=True):
        for noise in (0.98, 1.02, 1.0, 9.0, 1.01):
            chooser.learn(1, each, (2, 3) if each else (5, 0), (2 + 3 * time if each else 5) * noise)
    assert chooser.level([record], 1) == level
    shared = chooser.level([record, *[chooser.record([]) for _ in range(30)]], 1)
    assert shared == 0, "those that gain nothing count too"


def test_a_disturbed_round_is_not_held_against_drafts_for_ever(monkeypatch):
    monkeypatch.undo()
    chooser = Drafting(7, model=False)
    record = chooser.record([])
    record.gain = {3: Gain(3.9, 1.0), 7: Gain(7.2, 1.0)}.get
    chooser.learn(1, 0, (5, 0), 5.0)
    for level in (7, 3):
        assert chooser.level([record], 1) == level
        chooser.learn(1, level, (0, 5), 500.0)
    assert chooser.level([record], 1) == 0
    for _ in range(70):
        chooser.learn(1, 0, (5, 0), 5.0)
    assert chooser.level([record], 1) == 7


def test_a_draft_model_that_does_not_pay_is_asked_no_more(monkeypatch):
    monkeypatch.undo()
    model = oracle.tiny("llama")
    engine = Engine(model, None, SIZES, draft=nearly(model, 3.0))
    engine._loop._drafting.learn = lambda *about: None
    engine._loop._drafting._times = {(1, level): [1.0 + level / 4] for level in (0, 1, 3)}
    params = dataclasses.replace(GREEDY, max_tokens=70)
    prompts = oracle.prompts(90, 20)
    (result,) = engine.generate(prompts, params)
    assert result.token_ids == Engine(model, None, SIZES).generate(prompts, params)[0].token_ids
    assert 0 < engine.metrics().drafted < 60, (
        "of more than 200: two dispatches, and the one that follows on them"
    )
