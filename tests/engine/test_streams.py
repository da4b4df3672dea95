"""Who waits for what: streams, threads, coroutines, ends before the end, and an engine after a fault."""

import asyncio
import contextlib
import dataclasses
import signal
import threading

import numpy as np
import pytest

import jaxopt_llm as jo
from jaxopt_llm.engine import Engine, EngineConfig, SamplingParams
from jaxopt_llm.models import weights, with_weights
from tests import adapters
from tests.engine import oracle

SIZES = EngineConfig(max_slots=2, max_seq_len=128, max_tokens_per_step=32, decode_steps=4, page_size=16)
PARAMS = SamplingParams(max_tokens=30)
LILY = "Once upon a time, there was a little girl named Lily."
PROMPTS = [LILY, "The dog", "One day, a boy named Tom", "x"]


@pytest.fixture(scope="module")
def stories(data_dir):
    return jo.load(data_dir / "stories260K.gguf")


@pytest.fixture(scope="module")
def shared_engine(stories):
    return Engine(*stories, SIZES)


@pytest.fixture
def engine(shared_engine):
    """Holds nothing any more when a test is over."""
    yield shared_engine
    shared_engine.generate([[1]], SamplingParams(max_tokens=1))
    metrics = shared_engine.metrics()
    assert (metrics.waiting, metrics.running, metrics.pages_used) == (0, 0, (0,))


@pytest.fixture(scope="module")
def texts(shared_engine):
    return [result.text for result in shared_engine.generate(PROMPTS, PARAMS)]


def test_cancelled_while_it_runs_waits_or_speaks(engine, texts):
    running, speaking, waiting, last = (engine.submit(prompt, PARAMS) for prompt in PROMPTS)
    first = next(speaking)
    assert first.result is None
    for stream in (running, speaking, waiting):
        stream.cancel()
        stream.cancel()
    rest = list(speaking)
    assert rest[-1].result.finish_reason == "cancelled"
    assert first.text + "".join(chunk.text for chunk in rest) == rest[-1].result.text
    assert texts[1].startswith(rest[-1].result.text)
    assert waiting.result().token_ids == []
    assert waiting.result().tpot_ms is None
    assert last.result().text == texts[3]
    last.cancel()
    assert last.result().finish_reason == "length"
    assert list(last)[-1].result.text == texts[3]


def test_threads_stream_at_once(engine, texts):
    told = {}

    def follow(number):
        told[number] = "".join(chunk.text for chunk in engine.submit(PROMPTS[number], PARAMS))

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [told[number] for number in range(4)] == texts


def test_coroutines(engine, texts):
    async def follow(prompt):
        return "".join([chunk.text async for chunk in engine.submit(prompt, PARAMS)])

    async def wait(prompt):
        return (await engine.submit(prompt, PARAMS)).text

    async def both():
        return await asyncio.gather(*map(follow, PROMPTS[:2]), *map(wait, PROMPTS[2:]))

    assert asyncio.run(both()) == texts


def test_coroutines_beside_a_thread(engine, texts):
    """While one thread keeps the engine busy, others are told on their own event loop, and may change their minds."""

    async def main():
        work = asyncio.create_task(asyncio.to_thread(engine.generate, PROMPTS[:2], PARAMS))
        async with engine.submit(PROMPTS[2], PARAMS) as stream:
            first = await anext(stream)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(stream), 0)
        text = (await engine.submit(PROMPTS[3], PARAMS)).text
        return first.text, [result.text for result in await work], text

    first, others, last = asyncio.run(main())
    assert texts[2].startswith(first)
    assert [*others, last] == [texts[0], texts[1], texts[3]]


def test_what_is_dropped_holds_up_nobody(engine, stories):
    """Neither other requests nor an exchange of the weights."""
    for _ in engine.submit(PROMPTS[0], PARAMS):
        break
    engine.submit(PROMPTS[1], PARAMS)
    engine.update(stories[0])
    metrics = engine.metrics()
    assert (metrics.waiting, metrics.running, metrics.pages_used) == (0, 0, (0,))


@pytest.fixture
def interruptible():
    """Also where what started the tests has Control-C ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["run", "read"])
def test_an_interrupt_in_a_step_waits_for_its_end(engine, texts, monkeypatch, where):
    """Control-C while a program is compiled or sent, or while its result is fetched."""
    stream = engine.submit(PROMPTS[1], PARAMS)
    step, presses = getattr(engine._runner, where), [signal.SIGINT]

    def interrupted(*arguments, **options):
        if presses:
            signal.raise_signal(presses.pop())
        return step(*arguments, **options)

    monkeypatch.setattr(engine._runner, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPTS[0]], PARAMS)
    assert stream.result().text == texts[1]
    assert engine.metrics().running == 0


def test_an_interrupt_while_waiting_loses_nothing(engine, texts, monkeypatch):
    """Control-C in a notebook: the call ends, its requests with it, and the engine goes on."""
    with monkeypatch.context() as patch:
        patch.setattr("jax.block_until_ready", raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, PARAMS)
    assert [result.text for result in engine.generate(PROMPTS, PARAMS)] == texts


def raises(error):
    def function(*_, **__):
        raise error

    return function


def test_what_never_fits_is_refused_at_once(stories):
    engine = Engine(*stories, dataclasses.replace(SIZES, cache_tokens=128, max_seq_len=256))
    with pytest.raises(ValueError, match=r"needs 10 pages of 16 tokens \(window=None\) and there are 8"):
        engine.generate([LILY, [7] * 100], SamplingParams(max_tokens=50))
    with pytest.raises(ValueError, match="the prompt has 256 tokens and the context is 256; shorten it"):
        engine.submit([7] * 256, PARAMS)
    metrics = engine.metrics()
    assert (metrics.waiting, metrics.running, metrics.pages_free) == (0, 0, (8,))


def test_a_failed_step_is_told_to_all_who_come_later(stories, monkeypatch):
    engine = Engine(*stories, SIZES)
    stream = engine.submit(LILY, PARAMS)
    monkeypatch.setattr(engine._runner, "run", raises(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        engine.generate(["x"], PARAMS)
    monkeypatch.undo()

    async def both():
        return await asyncio.gather(stream, engine.submit("x", PARAMS), return_exceptions=True)

    assert [str(error)[:27] for error in asyncio.run(both())] == ["a step of this engine faile"] * 2
    for later in (stream.result, lambda: engine.generate([LILY], PARAMS), lambda: engine.score(LILY)):
        with pytest.raises(RuntimeError, match=r"a step of this engine failed.*make a new engine") as caught:
            later()
        assert isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.parametrize("mesh", [None, "data=2,tensor=2"])
def test_other_weights(mesh):
    """They go in without a compilation, and old pages are not found any more."""
    model = oracle.wide("int8")
    other = with_weights(model, {"final_norm.weight": -weights(model)["final_norm.weight"]})
    other = with_weights(
        other, {"layers.0.attention.q.weight": weights(model)["layers.1.attention.q.weight"]}
    )
    if mesh:
        model, other = (on(mesh, each) for each in (model, other))
    engine = Engine(model, None, SIZES)
    (prompt,) = oracle.prompts(90, 40)
    ask = lambda: engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True))[0]
    first = ask()
    assert ask().cached_tokens == 32
    engine.submit(prompt, PARAMS).cancel()
    abandoned = engine.submit(prompt, PARAMS)
    assert next(abandoned).token_ids
    with pytest.raises(ValueError, match="requests are under way"):
        engine.update(other)
    abandoned.cancel()
    with oracle.compilations() as seen:
        engine.update(other)
        second = ask()
        engine.update(model)
        third = ask()
    assert seen == []
    assert second.cached_tokens == third.cached_tokens == 0
    assert first.token_ids == third.token_ids != second.token_ids
    assert oracle.check_greedy(oracle.wide("int8"), prompt, third.token_ids) > 4
    with pytest.raises(ValueError, match="other parts, shapes, dtypes or devices"):
        engine.update(oracle.wide("int8_block"))
    with pytest.raises(ValueError, match="other parts, shapes, dtypes or devices"):
        engine.update(oracle.wide("int8") if mesh else on("tensor=2", model))
    assert ask().token_ids == first.token_ids


@pytest.mark.parametrize("mesh", [None, "tensor=2"])
def test_an_adapter_goes_in(tmp_path, mesh):
    """And out again, without a compilation: what is merged lies where the model's own weights lay."""
    module, model = "model.layers.0.self_attn.q_proj", oracle.wide()
    shape = weights(model)["layers.0.attention.q.weight"].shape
    tensors = adapters.lora(np.random.default_rng(0), module, *shape, 4)
    adapters.write(tmp_path, tensors, r=4, lora_alpha=400, target_modules=["layers.0.self_attn.q_proj"])
    merged = jo.load_adapter(tmp_path).merge(on(mesh, model) if mesh else model)
    engine = Engine(on(mesh, model) if mesh else model, None, SIZES)
    (prompt,) = oracle.prompts(90, 40)
    ask = lambda: engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    first = ask()
    with oracle.compilations() as seen:
        engine.update(merged)
        second = ask()
        engine.update(on(mesh, model) if mesh else model)
        assert ask() == first
    assert seen == []
    assert second != first
    assert oracle.check_greedy(jo.load_adapter(tmp_path).merge(model), prompt, second) > 4


def on(mesh, model):
    return jo.models.place(model, jo.checkpoints.mesh_sharding(mesh, model.config))
