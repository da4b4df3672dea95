"""Measured runs: kept in a file, fitted to, and predicted from one another."""

import dataclasses

import pytest

from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size import SERVER, Run, append_run, fit, held_out, read_runs, uncertainty
from tests.size.configs import llama

TRUTH = dataclasses.replace(
    SERVER, name="truth", weights=0.7, cache=0.3, flops=0.5, attention=0.2, layer_s=2e-5
)


def run(layers: int, concurrency: int, weights: str = "bf16", prompt: int = 1024) -> Run:
    """As it would be on a chip that reaches `TRUTH`."""
    asked = Run(
        config=llama(layers), chip=CHIPS["h100"], topology="1", mesh="data=1", weights=weights, kv="bf16",
        prompt_tokens=prompt, output_tokens=128, concurrency=concurrency, prefill_s=1.0, tpot_s=1.0,
    )  # fmt: skip
    prefill, tpot = asked.predicted(TRUTH)
    return dataclasses.replace(asked, prefill_s=prefill, tpot_s=tpot)


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
    prefill, tpot = large.predicted(found)
    assert prefill == pytest.approx(large.prefill_s, rel=0.1)
    assert tpot == pytest.approx(large.tpot_s, rel=0.1)


def test_each_is_predicted_from_the_others():
    odd = dataclasses.replace(RUNS[0], tpot_s=3 * RUNS[0].tpot_s)
    errors = held_out([odd, *RUNS[1:]])
    assert [one.run for one in errors] == [odd, *RUNS[1:]]
    assert errors[0].tpot == pytest.approx(-2 / 3, abs=0.05)
    told = uncertainty(RUNS, errors)
    assert "fitted to 6 runs on h100" in told
    assert f"within {max(abs(one.tpot) for one in errors):.0%} (time between tokens)" in told
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
