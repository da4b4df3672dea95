"""Candidates: what fits, how they are ranked, and what is refused."""

import dataclasses
import math

import pytest

from jaxopt_llm.size import Levels, chips_of, explanation, sweep, traffic
from jaxopt_llm.size.plot import front
from tests.size.configs import llama

BUSY = traffic(prompt=(512, 512), output=(64, 64), concurrency=8, requests=24)


def swept(chips, asked=BUSY, config=None, **changes):
    return sweep(config or llama(), asked, chips=chips_of(chips.split(",")), **changes)


def test_what_fits():
    """8B parameters in bfloat16 are 16.06 GB: more than one v5e has, or an H100 needs."""
    found = {
        (one.chip, one.topology): one
        for one in swept("v5e,h100")
        if one.mesh in ("data=1", "tensor=2", "tensor=4")
    }
    assert not found["v5e", "1x1"].fits
    assert found["v5e", "1x1"].bytes_per_chip.weights == 16_060_522_496
    assert found["v5e", "1x1"].ttft_ms is None
    assert found["v5e", "2x2"].fits
    large = found["h100", "2"]
    assert large.fits
    per_sequence = 2 * 32 * 8 * 128 * 2 / 2 * 640  # 576 tokens in pages of 128, on two chips
    assert large.max_batch * per_sequence < 80e9 - 8.1e9 < 1.1 * (large.max_batch + 1) * per_sequence


def test_fewer_bits_fit_smaller_chips():
    assert [one.fits for one in swept("v5e", topology="1x1", weights=["int8", "bf16"])] == [True, False]


def test_memory_that_binds():
    long = traffic(prompt=(4096, 4096), output=(32, 32), concurrency=64, requests=64)
    (one,) = swept("v5e", long, topology="1x1", weights=["int8"])
    assert one.bound == "capacity"
    assert one.batch == one.max_batch < 64


def test_the_cheapest_that_meets_the_levels_is_first():
    free = swept("v5e,v6e")
    assert [one.usd_per_mtok for one in free if one.meets] == sorted(
        one.usd_per_mtok for one in free if one.meets
    )
    tight = swept("v5e,v6e", levels=Levels(tpot_ms=free[0].tpot_ms.p95 * 0.7))
    assert tight[0].meets
    assert tight[0].usd_per_mtok > free[0].usd_per_mtok
    assert not next(one for one in tight if (one.chip, one.mesh) == (free[0].chip, free[0].mesh)).meets
    impossible = swept("v5e,v6e", levels=Levels(tpot_ms=1e-3))
    assert not impossible[0].meets
    assert explanation(impossible, traffic_is_timed=False).startswith("Nothing meets what was asked; ")


def test_prices():
    cost = lambda **prices: swept("h100", topology="1", prices=prices)[0].usd_per_mtok
    assert cost() is None
    one = swept("h100", topology="1", prices={"h100": 3.6})[0]
    assert one.usd_per_mtok == pytest.approx(3.6 / 3600 / one.tokens_per_s * 1e6)
    assert cost(h100=7.2) == pytest.approx(2 * cost(h100=3.6))


def test_more_than_it_can_take():
    flood = traffic(prompt=(512, 512), output=(64, 64), rate=10_000, requests=64)
    (one,) = swept("h100", flood, topology="1")
    assert not one.keeps_up
    assert "falls behind the traffic" in explanation([one], traffic_is_timed=True)
    (idle,) = swept(
        "h100",
        dataclasses.replace(flood, asked=tuple(a._replace(at=1e3 * a.at) for a in flood.asked)),
        topology="1",
    )
    assert idle.keeps_up
    assert idle.capacity > 2 * idle.tokens_per_s
    assert "more traffic" in explanation([idle], traffic_is_timed=True)


def test_the_bytes_of_a_chip_are_those_of_its_devices():
    """tpu7x: two devices a chip, eight on the smallest slice."""
    one = next(c for c in swept("tpu7x", topology="2x2x1") if c.mesh == "tensor=8")
    assert one.bytes_per_chip.weights == pytest.approx(16_060_522_496 / 4, rel=1e-3)


def test_what_has_no_room_beside_the_weights_does_not_fit():
    """Not even for requests that are shorter than a page."""
    short = traffic(prompt=(32, 32), output=(8, 8), concurrency=2, requests=4)
    (one,) = swept("v5e", short, topology="1x1")
    assert (one.fits, one.max_batch, one.batch) == (False, 0, 0)


def test_windows_leave_room():
    asked = traffic(prompt=(8192, 8192), output=(8, 8), concurrency=64, requests=64)
    whole, windowed = (
        swept("v6e", asked, llama(windows=windows), topology="1x1")[0].max_batch
        for windows in ((None,) * 32, (None, 1024, 1024, 1024) * 8)
    )
    assert windowed > 2 * whole


def test_nothing_fits():
    found = swept("t4", config=llama(80, d_model=8192, d_ff=28672, num_heads=64), topology="1")
    assert not any(one.fits for one in found)
    told = explanation(found, traffic_is_timed=False)
    assert told.startswith(
        "Nothing fits: on t4 1 (data=1, bf16) the weights alone take 141.1 GB of each chip"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chips": "v9"}, "chip v9 is unknown; known are this, v4, v5e"),
        ({"chips": "v5e", "topology": "3x3"}, "no v5e slice '3x3'; known are 1x1"),
        (
            {"chips": "v5e", "topology": "2x2", "mesh": "tensor=8"},
            "tensor=8 is of 8 devices, and v5e 2x2 has 4",
        ),
        ({"chips": "v5e", "mesh": "tensor=3"}, "tensor=3 is of 3 devices, and v5e 1x1 has 1, 2x2 has 4"),
        ({"chips": "v5e", "mesh": "tensor=64"}, "does not divide heads=32; tensor may be"),
        ({"chips": "v5e", "mesh": "expert=4"}, "not yet over expert"),
        ({"chips": "v5e", "kv": "int8"}, "no int8 keys and values on a TPU yet"),
        ({"chips": "h100", "kv": "int3"}, "keys and values are bf16 or int8"),
        ({"chips": "h100", "weights": ["int5"]}, "unknown quantization 'int5'"),
        ({"chips": "h100", "prices": {"v5e": 1.0}}, "v5e is none of h100"),
        ({"chips": "h100", "prices": {"h100": -1.0}}, "price h100=-1.0 must be more than 0"),
        ({"chips": "h100", "asked": traffic(prompt=(200_000, 200_000), concurrency=1)}, "context of 131072"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        swept(**changes)


@pytest.mark.parametrize("levels", [{"tpot_ms": 0}, {"ttft_ms": math.nan}, {"percentile": 101}])
def test_levels_that_are_none(levels):
    with pytest.raises(ValueError, match="must be"):
        Levels(**levels)


def test_the_front_of_a_plot():
    assert front([(1, 5), (2, 6), (2, 3), (3, 3), (4, 1), (1, 7)]) == [(1, 5), (2, 3), (4, 1)]
