"""The tests that are too long for every change: real models on meshes, downloads, 10,000 damaged files.

    python -m benchmarks.long_tests

Writes how each of them ended into benchmarks/results/long_tests.json; the exit code is 1 where one failed. Tests
against llama.cpp run where `$JAXOPT_PEER` names a Python that has llama-cpp-python.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from absl import app

from benchmarks.record import record

_RUNS: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "verify": (["-m", "verify", "tests"], {}),
    "fuzz": (["tests/checkpoints/test_fuzz.py"], {"JAXOPT_FUZZ": "10000"}),
}


def run(arguments: Sequence[str], settings: dict[str, str]) -> dict[str, Any]:
    """A run of pytest: its settings and how each test ended."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        subprocess.run(command, env=os.environ | settings, stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    tests = {f"{case.get('classname')}.{case.get('name')}": outcome(case) for case in cases}
    return {
        "settings": settings,
        "seconds": sum(float(case.get("time", 0)) for case in cases),
        "tests": tests,
    }


def outcome(case: ElementTree.Element) -> str:
    """`passed`, or what went wrong and why in one line."""
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return f"{child.tag}: {child.get('message', '').splitlines()[0]}"
    return "passed"


def main(argv: Sequence[str]) -> None:
    del argv
    results = {name: run(*what) for name, what in _RUNS.items()}
    record(Path(__file__).stem, results)
    outcomes = [end for result in results.values() for end in result["tests"].values()]
    sys.exit(not outcomes or any(end.startswith(("failure", "error")) for end in outcomes))


if __name__ == "__main__":
    app.run(main)
