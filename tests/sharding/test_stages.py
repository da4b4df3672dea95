"""Layers and the stages of a pipeline."""

import itertools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm.sharding import MeshSpec, Sharding, balanced
from jaxopt_llm.sharding.stages import stage_mesh


def slowest(costs, sizes, last):
    ends = [0, *itertools.accumulate(sizes)]
    sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    return max([*sums[:-1], sums[-1] + last])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4), st.integers(0, 12))
def test_no_other_split_has_a_faster_slowest_stage(costs, stages, last):
    if stages > len(costs):
        with pytest.raises(ValueError, match=f"stage={stages} has more stages than the model layers"):
            balanced(costs, stages)
        return
    sizes = balanced(costs, stages, last=last)
    assert len(sizes) == stages and sum(sizes) == len(costs) and min(sizes) >= 1
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    all_sizes = ([b - a for a, b in itertools.pairwise((0, *cut, len(costs)))] for cut in cuts)
    assert slowest(costs, sizes, last) == min(slowest(costs, other, last) for other in all_sizes)


def test_stages_have_devices_of_their_own():
    mesh = MeshSpec(data=2, stage=2, tensor=2).build()
    parts = [stage_mesh(mesh, stage) for stage in range(2)]
    assert [dict(part.shape) for part in parts] == [
        {"data": 2, "stage": 1, "expert": 1, "sequence": 1, "tensor": 2}
    ] * 2
    devices = [set(part.devices.flat) for part in parts]
    assert devices[0].isdisjoint(devices[1]) and devices[0] | devices[1] == set(jax.devices()[:8])
    assert stage_mesh(MeshSpec(stage=2, tensor=4).abstract(), 1) == MeshSpec(tensor=4).abstract()


def test_layers_fall_into_stages_as_asked_or_evenly():
    mesh, units = MeshSpec(stage=3).build(), {"heads": 8, "layers": 5}
    even, asked = Sharding(mesh, units), Sharding(mesh, units, stage_layers=(3, 1, 1))
    assert [even.stage_of(layer) for layer in range(5)] == [0, 0, 1, 1, 2]
    assert [asked.stage_of(layer) for layer in range(5)] == [0, 0, 0, 1, 2]


@pytest.mark.parametrize("sizes", [(3, 2), (3, 2, 1), (5, 0, 0)])
def test_stages_that_do_not_add_up_are_refused(sizes):
    message = rf"mesh stage={'.'.join(map(str, sizes))} must be 3 numbers of at least 1 that add up to the model's 5"
    with pytest.raises(ValueError, match=message):
        Sharding(MeshSpec(stage=3).build(), {"heads": 8, "layers": 5}, stage_layers=sizes)


def test_specs_name_the_layers_of_stages():
    spec = MeshSpec.parse("stage=20+12,tensor=4")
    assert (spec.stage, spec.tensor, spec.stage_layers) == (2, 4, (20, 12))
    assert str(spec) == "stage=20+12,tensor=4" and MeshSpec.parse(str(spec)) == spec
    for wrong in ("stage=20+", "tensor=2+2", "stage=2+x"):
        with pytest.raises(ValueError, match="needs a size"):
            MeshSpec.parse(wrong)
