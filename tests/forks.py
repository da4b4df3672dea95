"""Tests that fork: what a child process dies of."""

import os
import traceback
from collections.abc import Callable

import pytest

# The children read files and nothing else: no thread of JAX is missed.
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")


def in_child(function: Callable[[], object]) -> int:
    """Runs a function in a forked process; what it died of, as `os.waitstatus_to_exitcode` gives it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
