"""Models in the stages of a pipeline."""

import dataclasses

import jax
import pytest
from flax import nnx

import jaxopt_llm as jo
from jaxopt_llm.models import abstract, mesh_of, num_bytes, place, stage_layers, stages
from jaxopt_llm.sharding import MeshSpec, Sharding
from tests.engine import oracle


def devices(module):
    return {device for leaf in jax.tree.leaves(nnx.state(module)) for device in leaf.sharding.device_set}


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])  # with and without a head of its own
def test_each_part_lies_on_its_own_devices_and_has_what_it_needs(family):
    model = oracle.tiny(family, 3)
    sharding = Sharding(MeshSpec(stage=2, tensor=2).build(), model.config.units, stage_layers=(2, 1))
    placed = place(model, sharding)
    first, last = stages(placed)
    assert (len(first.layers), first.first_layer) == (2, 0)
    assert (len(last.layers), last.first_layer) == (1, 2)
    assert devices(first) == set(jax.devices()[:2]) and devices(last) == set(jax.devices()[2:4])
    assert hasattr(first, "embed") and not hasattr(first, "final_norm") and not hasattr(first, "head")
    assert hasattr(last, "final_norm") and hasattr(last, "embed") == model.config.tied
    shared = num_bytes(model.embed) if model.config.tied else 0
    assert num_bytes(first) + num_bytes(last) == num_bytes(model) + shared
    assert len(placed.layers) == 3 and stages(model) == [model]
    with pytest.raises(
        ValueError, match="on different devices, as the stages of a pipeline do, which the engine alone runs"
    ):
        mesh_of(placed)


def test_the_head_counts_where_layers_are_shared_out():
    """A head of as many bytes as two layers has one layer less beside it than the other stage has."""
    config = oracle.tiny("mistral", 4).config
    layer = num_bytes(abstract(config).layers[0])
    config = dataclasses.replace(config, vocab_size=round(2 * layer / 4 / config.d_model))
    assert stage_layers(config, 2) == (3, 1)
    assert stage_layers(config, 4) == (1, 1, 1, 1)


def test_checkpoints_load_into_stages(data_dir):
    story_file = data_dir / "stories107K.gguf"
    model, _ = jo.load(story_file, mesh="stage=1+1,tensor=2")
    assert [len(part.layers) for part in stages(model)] == [1, 1]
    by_itself, _ = jo.load(story_file, mesh="stage=2")
    assert len(stages(by_itself)) == 2
    with pytest.raises(ValueError, match="mesh stage=3 has more stages than the model layers"):
        jo.load(story_file, mesh="stage=3")
