"""Every family with every plan, in floats, and rounded to int8 on two of them."""

import pytest

from tests import families
from tests.engine import plans


@pytest.mark.verify
@pytest.mark.parametrize("family", families.TINY)
@pytest.mark.parametrize(
    ("mesh", "quantize"),
    [*((mesh, None) for mesh in plans.PLANS), ("stage=2,tensor=4", "int8"), ("expert=4", "int8")],
)
def test_tokens(family, mesh, quantize):
    model = plans.model_of(family)
    if "expert" in mesh and model.config.experts is None:
        pytest.skip("no experts")
    plans.check(model, mesh, quantize)
