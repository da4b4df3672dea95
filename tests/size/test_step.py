"""Times of steps: against the formulas, by hand."""

import dataclasses

import pytest

from jaxopt_llm.sharding import MeshSpec
from jaxopt_llm.sharding.chips import CHIPS
from jaxopt_llm.size.efficiency import ROOFLINE, SERVER
from jaxopt_llm.size.model import Shapes, Share
from jaxopt_llm.size.step import Piece, decode, prefill_s, step
from jaxopt_llm.size.topology import Topology
from tests.size.configs import llama

HOPPING = dataclasses.replace(ROOFLINE, hop_s=1e-6)


def slice_of(text):
    chip, _, axes = text.partition(":")
    return Topology.parse(CHIPS[chip], axes)


@pytest.fixture(scope="module")
def shapes():
    return Shapes.of(llama())


def test_decoding_one_sequence_reads_all_weights_once(shapes):
    terms = decode(Share.of(shapes, MeshSpec()), slice_of("h100:1"), 1, 1024, ROOFLINE)
    assert terms.weights == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 3.35e12)
    assert terms.cache == pytest.approx(2 * 32 * 8 * 128 * 2 * 1024 / 3.35e12)
    assert (terms.links, terms.layers, terms.bound) == (0, 0, "HBM bandwidth")
    assert terms.seconds == terms.weights + terms.cache


def test_a_long_prompt_is_bound_by_products(shapes):
    terms = step(Share.of(shapes, MeshSpec()), slice_of("h100:1"), [Piece(0, 8192)], ROOFLINE)
    products = 2 * (8_030_261_248 - 2 * 128256 * 4096) * 8192  # the head sees one row
    attention = 2 * 32 * 32 * 128 * 8192**2
    assert terms.bound == "FLOPs"
    assert terms.flops == pytest.approx((products + attention) / 989e12, rel=1e-3)


def test_reads_and_products_overlap_or_add_up(shapes):
    """Where nothing is hidden both count; a share of what is shorter, in between."""
    of = lambda exposed: decode(
        Share.of(shapes, MeshSpec()),
        slice_of("h100:1"),
        64,
        1024,
        dataclasses.replace(ROOFLINE, exposed=exposed),
    )
    none, half, all_ = of(0.0), of(0.5), of(1.0)
    assert all_.seconds == pytest.approx(all_.cache + all_.weights + all_.flops)
    assert none.seconds == pytest.approx(none.cache + none.weights)
    assert half.seconds == pytest.approx((none.seconds + all_.seconds) / 2)


@pytest.mark.parametrize(
    ("name", "shards", "bandwidth", "hops"),
    [
        ("v5e:2x2", 4, 2 * 50e9, 2),  # two axes, no ring: one link each way
        ("v5e:4x4", 16, 2 * 50e9, 6),
        ("v5e:16x16", 256, 2 * 2 * 50e9, 16),  # rings: both ways round
        ("v5e:4x4", 4, 50e9, 3),  # along one axis
        ("v5e:4x4", 2, 50e9, 1),
        ("v4:4x4x4", 64, 3 * 2 * 45e9, 6),
        ("v4:2x2x4", 16, 3 * 45e9, 5),  # no whole cube
        ("tpu7x:2x2x1", 8, 2 * 100e9, 2),  # eight devices are four chips
        ("h100:8", 8, 450e9, 1),
    ],
)
def test_collectives(name, shards, bandwidth, hops):
    place = slice_of(name)
    large = 1e9 * (shards - 1) / shards / bandwidth
    assert place.all_gather_s(1e9, shards, HOPPING) == pytest.approx(large)
    assert place.all_reduce_s(1e9, shards, HOPPING) == pytest.approx(2 * large)
    assert place.all_gather_s(1, shards, HOPPING) == pytest.approx(hops * 1e-6)
    assert place.all_reduce_s(1e9, 1, HOPPING) == 0


def test_two_all_reduces_a_layer(shapes):
    """And one for the embedding, and the logits gathered."""
    place = slice_of("h100:8")
    terms = decode(Share.of(shapes, MeshSpec(tensor=8)), place, 64, 1024, HOPPING)
    each = place.all_reduce_s(64 * 4096 * 2, 8, HOPPING)
    assert terms.links == pytest.approx(65 * each + place.all_gather_s(64 * 128256 * 4, 8, HOPPING))


def test_a_chip_of_two_devices_shares_its_memory_and_rate(shapes):
    """Two shards on one chip read as fast as the whole chip would."""
    place = slice_of("tpu7x:2x2x1")
    terms = decode(Share.of(shapes, MeshSpec(tensor=8)), place, 1, 1024, ROOFLINE)
    whole = 2 * (8_030_261_248 - 128256 * 4096) / (4 * 7.38e12)
    assert terms.weights == pytest.approx(whole, rel=1e-3)


def test_no_program_beats_the_roofline(shapes):
    for tensor in (1, 2, 4, 8):
        share = Share.of(shapes, MeshSpec(tensor=tensor))
        for rows in (1, 16, 256):
            real, least = (
                decode(share, slice_of("v6e:2x4"), rows, 2048, e).seconds for e in (SERVER, ROOFLINE)
            )
            assert real > least


def test_prompts_are_read_in_chunks(shapes):
    share, place = Share.of(shapes, MeshSpec()), slice_of("h100:1")
    chunks = [Piece(0, 512), Piece(512, 512), Piece(1024, 76)]
    alone = sum(step(share, place, [piece], SERVER).seconds for piece in chunks)
    assert prefill_s(share, place, 1100, 512, SERVER) == pytest.approx(alone)
    pair = step(share, place, [Piece(0, 256)] * 2, SERVER).seconds
    one = step(share, place, [Piece(0, 256)], SERVER).seconds
    assert prefill_s(share, place, 256, 512, SERVER, sequences=5) == pytest.approx(2 * pair + one)


@pytest.mark.parametrize(
    ("name", "message"),
    [("v5e:3x3", "no v5e slice '3x3'; known are 1x1, 2x2, 2x4"), ("h100:3", "known are 1, 2, 4, 8")],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        slice_of(name)
