"""Every plan with one family, of experts and windows; `tests/verify/test_plans.py` has every family."""

import pytest

from tests.engine import plans


@pytest.mark.parametrize("mesh", plans.PLANS)
def test_tokens(mesh):
    plans.check(plans.model_of("gpt_oss"), mesh)
