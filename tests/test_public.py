"""The names of the package itself."""

import subprocess
import sys

import pytest

import jaxopt_llm as jo


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'jaxopt_llm' has no attribute 'quantise'"):
        jo.quantise  # noqa: B018 - read for its error


def test_a_dependency_that_is_not_installed_is_named():
    script = "import sys; sys.modules['jax'] = None; import jaxopt_llm as jo; jo.evaluate"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of jax")
