"""Where downloaded models and compiled programs are kept. Imports no JAX: it is asked before JAX is loaded."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxopt_llm`, else `~/.cache/jaxopt_llm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxopt_llm"
