"""One folder for downloads and compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxopt_llm import cache
from jaxopt_llm.cache import cache_folder

DIR, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
ENGINE = """
import sys, jax, jaxopt_llm as jo
model, _ = jo.load(sys.argv[1])
assert jax.config.values["jax_compilation_cache_dir"] is None, "a user's own process, until it makes an engine"
jo.generate(model, None, [[1, 403]], max_tokens=4)
"""


@pytest.mark.parametrize("value", [None, "", "~/kept"])
def test_commands_and_downloads_share_it(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cache.prepare()
    expected = tmp_path / ("kept" if value else ".cache") / "jaxopt_llm"
    assert cache_folder() == expected
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == expected / "xla"


def test_an_engine_keeps_its_programs(monkeypatch, tmp_path, data_dir):
    """As a library, too: not what ran before it."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", ENGINE, data_dir / "stories260K.gguf"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {path.parent.parent for path in tmp_path.rglob("jit_step-*-cache")} == {
        tmp_path / "jaxopt_llm" / "xla"
    }


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Sets JAX's settings; all are put back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: jax.config.values[name] for name in (DIR, ENABLED)}
    yield jax.config.update
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("own", ["/somewhere", ""])
def test_a_users_own_folder_stays(config, own):
    config(DIR, own)
    cache.keep_programs()
    assert jax.config.values[DIR] == own


def test_it_can_be_switched_off(config, tmp_path):
    config(DIR, None)
    config(ENABLED, False)
    cache.keep_programs()
    assert jax.config.values[DIR] is None
    assert not list(tmp_path.iterdir())
    config(ENABLED, True)
    cache.keep_programs()
    assert Path(jax.config.values[DIR]).parent == tmp_path / "jaxopt_llm" / "xla"


def test_nothing_is_kept_where_nothing_can_be_written(config, monkeypatch, tmp_path):
    """A home directory that is a file stands for one that may not be written to, which root may."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    config(DIR, None)
    cache.keep_programs()
    cache.prepare()
    assert jax.config.values[DIR] is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
