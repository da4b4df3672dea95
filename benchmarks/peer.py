"""llama.cpp, run by another Python: the one that `--peer` names."""

import subprocess
from pathlib import Path

from absl import flags

PEER = flags.DEFINE_string("peer", None, "Python interpreter with llama-cpp-python.", required=True)


def ask(script: str, *arguments: object, stdin: str) -> str:
    """What a script of this folder prints.

    Raises:
      RuntimeError: if it fails.
    """
    return _run(str(Path(__file__).with_name(script)), *map(str, arguments), stdin=stdin)


def version(package: str = "llama-cpp-python", *, python: str | None = None) -> str:
    """Of a package there, or of another interpreter's; llama-cpp-python's stands for llama.cpp's."""
    script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return _run("-c", script, package, python=python).strip()


def _run(*arguments: str, stdin: str = "", python: str | None = None) -> str:
    command = [python or PEER.value, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr[-2000:]}")
    return done.stdout
