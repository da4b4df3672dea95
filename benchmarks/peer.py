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


def version() -> str:
    """Of llama-cpp-python, and so of llama.cpp."""
    return _run("-c", "import llama_cpp; print(llama_cpp.__version__)").strip()


def _run(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run([PEER.value, *arguments], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr[-2000:]}")
    return done.stdout
