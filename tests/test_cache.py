"""One folder for downloads and compiled programs."""

import os
from pathlib import Path

import pytest

from jaxopt_llm.cache import cache_folder
from jaxopt_llm.cli import machine


@pytest.mark.parametrize("value", [None, "", "~/kept"])
def test_commands_and_downloads_share_it(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    machine.prepare()
    expected = tmp_path / ("kept" if value else ".cache") / "jaxopt_llm"
    assert cache_folder() == expected
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent == expected / "xla"
