"""House rules that a linter does not know."""

import ast
import dataclasses
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxopt_llm import configs

ROOT = Path(__file__).parents[1]
CODE = ("jaxopt_llm", "sharding", "configs")
# Places of one machine; in pieces, so that this file does not name them.
MACHINE_PATH = re.compile(
    "(?<![\\w.])/(?:" + "|".join(("work", "tmp", "root", r"home/\w+", r"Users/\w+")) + ")/"
)
PACKAGE_INDEX = re.compile("(?:extra-)?index" + "-url|find" + "-links|trusted" + "-host")


def tracked_files() -> list[Path]:
    """Files that git has or would take."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def text_files() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def test_no_module_is_called_utils():
    assert [path for path in tracked_files() if path.stem in ("util", "utils")] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, PACKAGE_INDEX], ids=["paths", "package hosts"])
def test_files_name_no_machine(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def config_types() -> set[type]:
    """Every dataclass in what the packaged configs return."""
    found: set[type] = set()
    waiting = [configs.load(name) for name in configs.names()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting.extend(value)
        elif dataclasses.is_dataclass(value):
            found.add(type(value))
            waiting.extend(getattr(value, field.name) for field in dataclasses.fields(value))
    return found


def unread(kinds: set[type]) -> set[str]:
    """Fields whose name no code takes from any object."""
    trees = [ast.parse(path.read_text("utf-8")) for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return {field.name for kind in kinds for field in dataclasses.fields(kind)} - read


def test_every_field_of_a_config_is_read():
    assert unread(config_types()) == set()


def test_an_unread_field_is_seen():
    assert unread({dataclasses.make_dataclass("Example", ["shape", "shpae"])}) == {"shpae"}
