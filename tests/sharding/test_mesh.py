"""What a mesh is called."""

import jax
import pytest

from jaxopt_llm.sharding import MESH_AXES, MeshSpec


def test_parse_and_print():
    spec = MeshSpec.parse("data=2, tensor=4")
    assert spec == MeshSpec(data=2, tensor=4)
    assert spec.size == 8
    assert MeshSpec.parse(str(spec)) == spec
    assert MeshSpec.parse(spec) is spec
    assert MeshSpec.parse("") == MeshSpec()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "needs a size"),
        ("tensor=four", "needs a size"),
        ("tensor=0", "at least 1"),
        ("tensor=2,tensor=2", "twice"),
        ("model=2", "axes are data, stage, expert, sequence, tensor"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        MeshSpec.parse(text)


def test_build():
    mesh = MeshSpec(data=2, tensor=4).build()
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == (2, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
        MeshSpec(tensor=16).build()
    assert MeshSpec(tensor=2).build(jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:6]
