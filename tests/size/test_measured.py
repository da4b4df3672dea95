"""Measured runs: kept in a file, fitted to, and predicted from one another."""

import dataclasses

import pytest

from jaxopt_llm.evaluate import Speed, Spread
from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size import (
    SERVER,
    Run,
    append_run,
    fit,
    held_out,
    read_runs,
    settled,
    uncertainty,
    untold,
)
from tests.size.configs import llama

TRUTH = dataclasses.replace(
    SERVER, name="truth", weights=0.7, cache=0.3, flops=0.5, attention=0.2, layer_s=2e-5
)
OWN = dataclasses.replace(CHIPS["h100"], name="this", links=0)  # a CPU, as these tests have one


def run(layers: int, concurrency: int, weights: str = "bf16", prompt: int = 1024, **other) -> Run:
    """As it would be on a chip that reaches `TRUTH`, or another truth."""
    asked = Run(
        config=llama(layers), chip=other.get("chip", CHIPS["h100"]), topology="1", mesh="data=1", weights=weights,
        kv="bf16", prompt_tokens=prompt, output_tokens=128, concurrency=concurrency, prefill_s=1.0, step_s=1.0,
    )  # fmt: skip
    prefill, step = asked.predicted(other.get("truth", TRUTH))
    return dataclasses.replace(asked, prefill_s=prefill, step_s=step)


RUNS = [
    run(4, 1), run(4, 16, prompt=4096), run(16, 4), run(32, 1, "int8"), run(32, 32, prompt=256), run(8, 64, prompt=2048)
]  # fmt: skip


def test_factors_that_runs_tell_of_are_found():
    found = fit(RUNS)
    for name in ("weights", "cache", "flops", "attention"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    assert (found.links, found.hop_s) == pytest.approx((SERVER.links, SERVER.hop_s)), (
        "nothing was said of them"
    )


def test_larger_and_more_at_once_than_any_measured():
    found = fit(RUNS[:4])
    large = run(80, 64)
    prefill, step = large.predicted(found)
    assert prefill == pytest.approx(large.prefill_s, rel=0.1)
    assert step == pytest.approx(large.step_s, rel=0.1)


@pytest.mark.parametrize("exposed", [0.1, 0.8])
def test_what_reads_and_products_do_not_hide_of_each_other_shows_in_short_prompts(exposed):
    on_cpu = {"truth": dataclasses.replace(TRUTH, exposed=exposed), "chip": OWN}
    sizes = ((1, 64), (1, 128), (4, 64), (2, 256), (16, 4096), (4, 2048))
    runs = [run(layers, *size, **on_cpu) for layers in (8, 32) for size in ((c, "bf16", p) for c, p in sizes)]
    found = fit(runs)
    assert found.exposed == pytest.approx(exposed, abs=0.1)
    large = run(80, 128, **on_cpu)
    assert large.predicted(found)[1] == pytest.approx(large.step_s, rel=0.05)


def test_waiting_for_the_prompts_of_others_is_no_decoding():
    """The rate at which all decode, not the mean time between tokens, which has the others' prompts in it."""
    spread = lambda value: Spread.of([value])
    found = Speed(
        prefill_tokens_per_s=spread(4000.0), decode_tokens_per_s=spread(400.0), ttft_ms=spread(1.0),
        tpot_ms=spread(99.0), output_tokens_per_s=spread(1.0), mbu=spread(0.5), programs=2,
    )  # fmt: skip
    made = Run.of(
        found, config=llama(4), chip=CHIPS["h100"], weights="bf16", kv="bf16", prompt_tokens=100, output_tokens=8,
        concurrency=8,
    )  # fmt: skip
    assert (made.prefill_s, made.step_s) == pytest.approx((0.2, 0.02))


def test_factors_that_runs_do_not_tell_are_named():
    assert not {"weights", "cache", "flops"} & set(untold(RUNS))
    alone = [run(16, 1, prompt=64), run(32, 1, prompt=64)]
    assert "cache" in untold(alone)
    told = uncertainty(alone, held_out(alone))
    assert "tell too little of weights, cache, " in told
    assert "add runs of one sequence and of several long prompts" in told


def test_the_machine_at_hand_has_one_set_of_figures():
    """However different its measurements are: the times that runs took do not depend on them."""
    measured = [
        dataclasses.replace(OWN, hbm_bandwidth=scale * OWN.hbm_bandwidth, bf16_flops=scale * OWN.bf16_flops)
        for scale in (0.5, 1.0, 3.0)
    ]
    runs = [dataclasses.replace(one, chip=measured[i % 3]) for i, one in enumerate(RUNS)]
    assert {one.chip for one in settled(runs)} == {OWN}
    assert fit(runs) == fit([dataclasses.replace(one, chip=OWN) for one in RUNS])
    assert settled(RUNS) == RUNS


def test_each_is_predicted_from_the_others():
    odd = dataclasses.replace(RUNS[0], step_s=3 * RUNS[0].step_s)
    errors = held_out([odd, *RUNS[1:]])
    assert [one.run for one in errors] == [odd, *RUNS[1:]]
    assert errors[0].step == pytest.approx(-2 / 3, abs=0.05)
    told = uncertainty(RUNS, errors)
    assert "fitted to 6 runs on h100" in told
    assert f"within {max(abs(one.step) for one in errors):.0%} (time between tokens)" in told
    assert held_out(RUNS[:1]) == []
    assert "nothing tells how far off" in uncertainty(RUNS[:1], [])


def test_a_file_of_runs(tmp_path):
    path = tmp_path / "runs.json"
    own = dataclasses.replace(CHIPS["h100"], name="this", kinds=("cpu",), links=0)
    runs = [RUNS[0], dataclasses.replace(RUNS[1], chip=own)]
    for one in runs:
        append_run(path, one)
    assert read_runs(path) == runs
    assert [each.name for each in tmp_path.iterdir()] == ["runs.json"]


@pytest.mark.parametrize("text", ["[]", "{}", "[1]", '[{"chip": "h100"}]', "nothing"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, text):
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"runs\.json holds no run"):
        append_run(path, RUNS[0])
    assert path.read_text() == text
