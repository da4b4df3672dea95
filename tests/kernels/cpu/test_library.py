"""How the library is found, configured and shared between processes."""

import os
import subprocess
import sys

import pytest

from jaxopt_llm.kernels.cpu import library

needs_library = pytest.mark.skipif(
    library.load() is None, reason="the library was not built: no C++ compiler"
)
PRODUCT = """
import jax, jax.numpy as jnp, os
from jaxopt_llm.kernels import FORMATS, linear, pack
from jaxopt_llm.kernels.cpu import library
p = pack([FORMATS["int8_block"].quantize(jnp.full((1000, 64), 127.0))])
product = jax.jit(lambda x: linear(x, p))
x = jnp.ones((20, 64))
print(library.status(), float(product(x).sum()))
"""


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120
    )


@needs_library
@pytest.mark.parametrize("isa", library.supported() if library.load() else [])
def test_environment_chooses(isa):
    done = run(PRODUCT, JAXOPT_CPU_ISA=isa, JAXOPT_CPU_THREADS="3")
    assert done.stdout.strip() == f"{isa}, threads: 3 162560000.0", done.stderr


@needs_library
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAXOPT_CPU_ISA", "avx1024", "'avx1024' is not among what this machine runs: .*portable"),
        ("JAXOPT_CPU_THREADS", "0", "'0' must be a number of threads from 1 to 1024"),
        ("JAXOPT_CPU_THREADS", "two", "'two' must be"),
    ],
)
def test_bad_environment_is_refused(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    library.load.cache_clear()
    with pytest.raises(ValueError, match=message):
        library.load()
    monkeypatch.undo()
    library.load.cache_clear()


@needs_library
def test_a_forked_child_makes_its_own_threads():
    fork = f"""
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
{PRODUCT}
child = os.fork()
if child == 0:
    print(float(product(x).sum()), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(fork, JAXOPT_CPU_THREADS="4", PYTHONWARNINGS="ignore")
    assert done.stdout.split()[-2:] == ["162560000.0"] * 2, done.stderr


def test_without_the_library_weights_stay_as_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_FILE", tmp_path / "absent.so")
    library.load.cache_clear()
    try:
        assert library.load() is None
        assert "absent.so was not built" in library.status()
    finally:
        monkeypatch.undo()
        library.load.cache_clear()


def test_import_loads_nothing():
    code = """
import jaxopt_llm.kernels
from jaxopt_llm.kernels.cpu import library
print(library.load.cache_info().misses)
"""
    assert run(code).stdout.strip() == "0"
