"""What the host sends, and the sizes it is padded to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_llm.engine import EngineConfig, SamplingParams, inputs
from jaxopt_llm.engine.generation import Generation, Wanted
from jaxopt_llm.engine.inputs import Shape
from jaxopt_llm.engine.plan import Piece, Plan, Request
from jaxopt_llm.engine.program import Sampled
from jaxopt_llm.engine.scheduler import SchedulerConfig
from tests.engine import oracle

VOCAB = 70
SIZES = SchedulerConfig(
    max_slots=6, page_size=4, num_pages=(8, 8), windows=(None, 6), max_tokens_per_step=48, max_seq_len=40,
    decode_steps=3,
)  # fmt: skip
TABLE = np.arange(2 * 6 * 10, dtype=np.int32).reshape(2, 6, 10)


def generation(prompt, *, wanted=Wanted(), allowed=None, stop_ids=(), seed=0, **settings):
    params = SamplingParams(max_tokens=5, **settings)
    request = Request(id=0, prompt=prompt, max_tokens=0 if wanted != Wanted() else 5)
    return Generation(
        request, params, seed=seed, stop_ids=frozenset(stop_ids), tokenizer=None, start=0.0, wanted=wanted,
        allowed=allowed,
    )  # fmt: skip


def piece(asked, slot, start, length, limit=1, *, decodes=False, begins=False):
    return Piece(asked.request, slot, start, length, limit, decodes, begins)


def plan(*pieces):
    return Plan(pieces=pieces, steps=1, page_table=TABLE)


@pytest.mark.parametrize(
    ("lengths", "decodes", "expected"),
    [
        ([1], True, Shape(1, 1, 3, False)),
        ([1] * 3, True, Shape(4, 4, 3, False)),
        ([1] * 5, True, Shape(6, 6, 3, False)),
        ([1], False, Shape(6, 32, 1, False)),
        ([1, 30, 1], False, Shape(6, 32, 1, False)),
        ([33], False, Shape(6, 48, 1, False)),
    ],
)
def test_shape_is_the_smallest_that_fits(lengths, decodes, expected):
    asked = generation(range(40))
    planned = plan(*(piece(asked, i, 0, n, decodes=decodes) for i, n in enumerate(lengths)))
    assert inputs.shape([planned], SIZES, full=False) == expected
    assert expected in inputs.shapes(SIZES, full=False)
    nothing = plan(piece(asked, 0, 3, 1, decodes=True))
    assert inputs.shape([planned, nothing], SIZES, full=False) == expected, "one for all data shards"


def test_shapes():
    assert len(inputs.shapes(SIZES, full=True)) == 2 + 4  # 32 and 48 tokens; 1, 2, 4 and 6 rows
    of = lambda tokens, rows: [
        s[:3] for s in inputs.shapes(SIZES, prompt_tokens=tokens, rows=rows, full=False)
    ]
    assert of(50, 3) == [(4, 4, 3), (6, 32, 1), (6, 48, 1)]
    assert of(48, 6) == [(6, 6, 3), (6, 48, 1)]
    even = dataclasses.replace(SIZES, max_slots=32, max_tokens_per_step=32, decode_steps=1)
    assert len(inputs.shapes(even, full=False)) == 6, "one program where decoding is no other"


def test_build():
    first = generation(range(10, 30), stop_ids=(2, 9), seed=7, temperature=0.5)
    second = generation([1, 2, 3], top_k=4)
    planned = plan(piece(second, 4, 5, 1, limit=1, decodes=True), piece(first, 1, 8, 4, limit=0))
    built = inputs.build(planned, [second, first], Shape(6, 8, 1, False), inputs.Widths(6, VOCAB, 3))
    assert built.tokens.tolist() == [-1, 18, 19, 20, 21, 0, 0, 0]
    assert built.positions.tolist()[:5] == [5, 8, 9, 10, 11]
    assert built.rows.tolist() == [0, 1, 1, 1, 1, 6, 6, 6]
    assert built.slots.tolist() == [4, 1, 6, 6, 6, 6]
    assert built.kv_len.tolist() == [6, 12, 0, 0, 0, 0]
    assert built.query_start.tolist() == [0, 1, 5, 5, 5, 5, 5]
    assert built.num_rows == 2
    assert built.limit.tolist() == [1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(built.page_table[:, :2], TABLE[:, [4, 1]])
    assert built.stop_ids.tolist() == [[-1] * 3, [2, 9, -1], *[[-1] * 3] * 4]
    assert built.sampling.temperature.tolist() == [0, 0.5, 0, 0, 0, 0]
    assert built.sampling.top_k.tolist() == [4, 0, 0, 0, 0, 0]
    assert built.sampling.seed.tolist() == [0, 7, 0, 0, 0, 0]
    assert built.extras is None


def test_build_with_every_part():
    scored = generation(range(10, 20), wanted=Wanted(scores=True))
    masked = generation(
        [1, 2, 3], allowed=lambda tokens: np.arange(VOCAB) == 65, logit_bias={3: 1.5, 8: -2.0}
    )
    asks = generation([5, 6], logprobs=0)
    planned = plan(
        piece(masked, 0, 2, 1, decodes=True),
        piece(asks, 3, 0, 2, begins=True),
        piece(scored, 1, 4, 6, limit=0),
    )
    extras = inputs.build(
        planned, [masked, asks, scored], Shape(6, 16, 1, True), inputs.Widths(6, VOCAB, 3)
    ).extras
    assert extras.targets.tolist() == [-1] * 3 + [15, 16, 17, 18, 19] + [-1] * 8, "none after the last"
    assert extras.mask.tolist()[:2] == [[0, 0, 2], [2**32 - 1] * 3]
    assert extras.fresh.tolist() == [False, True, False, False, False, False]
    assert extras.prompt_len.tolist()[:3] == [3, 2, 10]
    assert extras.bias_ids[0, :3].tolist() == [3, 8, -1]
    assert extras.bias[0, :3].tolist() == [1.5, -2.0, 0.0]
    assert extras.logprobs


def test_padding_has_the_form_of_the_real_thing():
    """What `idle` compiles is what `build` runs."""
    for shape in (*inputs.shapes(SIZES, full=True), *inputs.shapes(SIZES, full=False)):
        asked = generation([1, 2], stop_ids=range(3))
        real = inputs.build(plan(piece(asked, 0, 0, 1)), [asked], shape, inputs.Widths(6, VOCAB, 3))
        idle = inputs.idle(shape, inputs.Widths(6, VOCAB, 3), TABLE)
        form = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert form(real) == form(idle)
        assert not idle.limit.any()
        assert (idle.rows == shape.rows).all()


def sampled(*tokens, finite=True):
    column = lambda values, dtype: jnp.array(values, dtype)[:, None]
    return jax.device_get(
        Sampled(tokens=column(tokens, np.int32), finite=column([finite] * len(tokens), bool))
    )


def test_generation_ends_once():
    asked = generation([1, 2], stop_ids=[9])
    decode = piece(asked, 0, 2, 1, limit=3, decodes=True)
    assert asked.take_tokens(decode, sampled(4, 9, 5), 0, now=2.0) == [4, 9]
    assert (asked.tokens, asked.finish_reason) == ([4, 9], "stop")
    asked.end("cancelled")
    assert asked.take_tokens(decode, sampled(4, 4, 4), 0, now=3.0) == []
    result = asked.result()
    assert (result.finish_reason, result.error, result.text) == ("stop", None, "")
    assert (result.ttft_ms, result.tpot_ms) == (2000.0, 0.0)


def test_generation_ends_at_its_length_or_in_an_error():
    asked = generation([1, 2])
    decode = piece(asked, 0, 2, 1, limit=4, decodes=True)
    assert asked.take_tokens(decode, sampled(4, 4, 4, 4), 0, now=1.0) == [4] * 4
    assert not asked.ended
    assert asked.take_tokens(decode, sampled(6, 6, 6, 6), 0, now=2.0) == [6]
    assert asked.finish_reason == "length"
    failed = generation([1, 2])
    assert failed.take_tokens(decode, sampled(4, 4, 4, 4, finite=False), 0, now=1.0) == []
    failed.end("cancelled")
    assert (failed.finish_reason, failed.tokens) == ("error", [])
    assert "no numbers" in failed.error
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generation([1], stop=("x",))


def test_only_what_needs_it_takes_the_full_program():
    assert not any(generation([1], **s).full for s in ({}, {"temperature": 1.0, "top_p": 0.5}, {"seed": 3}))
    full = ({"logprobs": 0}, {"presence_penalty": 0.1}, {"logit_bias": {1: 1.0}}, {"allowed": lambda _: None})
    assert all(generation([1], **s).full for s in (*full, {"wanted": Wanted(hidden=True)}))


def test_a_fitting_engine():
    model = oracle.wide().config  # a context of 128
    sizes = lambda requests, tokens: EngineConfig.fitting(model, requests=requests, tokens=tokens)
    assert (sizes(3, 20).max_slots, sizes(3, 20).max_seq_len, sizes(3, 20).cache_tokens) == (4, 64, 256)
    assert (sizes(40, 65).max_slots, sizes(40, 65).max_seq_len) == (16, 128)
    assert sizes(1, 5000).max_seq_len == 128
    assert (sizes(0, 0).max_slots, sizes(0, 0).max_seq_len) == (1, 64)


def test_sizes_for_a_model():
    model = oracle.wide().config  # a window of 16 in one layer
    sizes = EngineConfig(max_slots=4, max_tokens_per_step=32).scheduler(model)
    assert sizes.windows == (16, None)
    assert sizes.num_pages == (4 * (3 + 2), 4 * 8), "of the window, what 4 chunks of 32 see"
    assert (sizes.max_seq_len, sizes.max_tokens_per_step, sizes.decode_steps) == (128, 32, 8)
    assert EngineConfig(max_slots=64, max_tokens_per_step=8).scheduler(model).max_tokens_per_step == 64
    assert EngineConfig(cache_tokens=40, page_size=16).scheduler(model).num_pages == (3, 3)
    assert EngineConfig(cache_dtype="int8").kv_dtype(np.dtype("float32")) == np.int8
    assert EngineConfig().kv_dtype(np.dtype("float32")) == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_slots": 0}, "max_slots=0 must be a whole number of at least 1"),
        ({"max_slots": 1.5}, "max_slots=1.5 must be a whole number"),
        ({"max_slots": True}, "max_slots=True must be a whole number"),
        ({"page_size": -1}, "page_size=-1 must be a whole number of at least 1"),
        ({"page_size": "16"}, "page_size='16' must be a whole number"),
        ({"decode_steps": None}, "decode_steps=None must be a whole number"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be a whole number of at least 1"),
        ({"cache_tokens": 0}, "cache_tokens=0 must be a whole number of at least 1"),
        ({"cache_tokens": 1e3}, "cache_tokens=1000.0 must be a whole number"),
        ({"prefix_cache": "no"}, "prefix_cache='no' must be True or False"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' must be one of float32, bfloat16, float16, int8"),
        ({"max_seq_len": 129}, "max_seq_len=129 is beyond the model's context of 128"),
    ],
)
def test_sizes_that_make_no_sense(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings).scheduler(oracle.wide().config)
