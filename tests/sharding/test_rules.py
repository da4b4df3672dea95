"""From logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_llm.sharding import RULES, AxisRules, MeshSpec, Sharding, psum


@pytest.fixture
def sharding():
    mesh = MeshSpec(data=2, tensor=4).build()
    return Sharding(mesh, {"heads": 8, "kv_heads": 2, "mlp": 30, "vocab": 101, "embed": 48, "experts": 5})


def test_axes_go_where_the_rules_say(sharding):
    assert sharding.spec(("heads", "embed")) == P("tensor", None)
    assert sharding.spec(("embed", "heads")) == P(None, "tensor")
    assert sharding.spec((None,)) == P(None)


def test_too_few_kv_heads_and_odd_vocabularies_stay_whole(sharding):
    assert sharding.spec(("kv_heads", "embed")) == P(None, None)
    assert sharding.spec(("vocab", "embed")) == P(None, None)


def test_what_does_not_divide_is_refused(sharding):
    message = r"mlp.up: mesh tensor=4 does not divide mlp=30; tensor may be \[2, 3, 5, 6, 10, 15, 30\]"
    with pytest.raises(ValueError, match=message):
        sharding.spec(("mlp", "embed"), "mlp.up")


def test_a_mesh_axis_of_one_divides_anything(sharding):
    assert sharding.spec(("experts", "embed")) == P(None, None)


def test_collision_is_refused():
    rules = AxisRules({**RULES.mesh_axes, "embed": "tensor"})
    sharding = Sharding(MeshSpec(tensor=4).build(), {"heads": 8, "embed": 48}, rules)
    with pytest.raises(ValueError, match="one array twice"):
        sharding.spec(("heads", "embed"), "q")


def test_unknown_logical_axis_is_refused(sharding):
    with pytest.raises(ValueError, match="no rule for logical axis 'color'"):
        sharding.spec(("color",))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stage=4", "mesh stage=4 would split nothing: the model has no layers; leave stage at 1"),
        ("expert=2,tensor=2", "mesh expert=2 would split nothing: the model has no experts"),
    ],
)
def test_mesh_axes_that_split_nothing_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        Sharding(MeshSpec.parse(spec).build(), {"heads": 8})


def test_a_batch_is_the_callers_to_split():
    sharding = Sharding(MeshSpec(data=8).build(), {"heads": 8})
    assert sharding.spec(("batch", None)) == P("data", None)


@pytest.mark.parametrize("devices", [1, 4])
def test_meshes_of_other_axes_are_refused(devices):
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("model",))
    with pytest.raises(ValueError, match="unknown mesh axis 'model'; axes are data, stage, expert"):
        Sharding(mesh, {"heads": 8})


def test_meshes_of_explicit_axes_are_refused():
    """What `jax.make_mesh` gives by itself."""
    mesh = jax.make_mesh((4,), ("tensor",))
    with pytest.raises(
        ValueError, match=r"axes are Explicit and must be Auto: give jax.make_mesh axis_types="
    ):
        Sharding(mesh, {"heads": 8})


def test_a_mesh_of_ones_own_may_have_some_of_the_axes():
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("tensor",))
    assert Sharding(mesh, {"heads": 8}).spec(("heads", "embed")) == P("tensor", None)


def test_psum_sums_inside_a_shard_map_alone():
    mesh = MeshSpec(tensor=4).build()
    x = jnp.arange(8.0)
    assert (psum(x, "tensor") == x).all()
    summed = jax.shard_map(lambda x: psum(x, "tensor"), mesh=mesh, in_specs=P("tensor"), out_specs=P())(x)
    assert summed.tolist() == [12.0, 16.0]
