"""A module imports only from lower floors, and siblings do not import each other: read from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"sharding", "cache"},
    {"kernels"},
    {"models", "text"},
    {"checkpoints"},
    {"engine"},
    {"evaluate", "calibrate"},
    {"quantize", "prune", "distill", "report"},
    {"optimize", "size", "bench", "route"},
    {"serve", "refine"},
    {"configs"},  # scenarios are made of what lies below; the commands read them
    {"cli"},
    {"__main__"},
)
FLOOR = {package: height for height, packages in enumerate(FLOORS) for package in packages}
PUBLIC_NAMES = FLOOR["serve"]  # `import jaxopt_llm`, or a name from it, reaches this high
PROGRAMS = "jaxopt_llm.configs.launch."  # whole programs, such as a user writes: nothing imports them
HOST_ONLY = {f"jaxopt_llm.engine.{name}" for name in ("pages", "plan", "scheduler")}


def sources() -> dict[str, Path]:
    """Every module and its file; the links to `sharding/` and `configs/` are not followed by glob."""
    files = {}
    for folder, prefix in (("jaxopt_llm", ""), ("sharding", "jaxopt_llm."), ("configs", "jaxopt_llm.")):
        for path in (ROOT / folder).rglob("*.py"):
            files[prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    files = {name: path for name, path in files.items() if not name.startswith(PROGRAMS)}
    del files["jaxopt_llm.__init__"]  # the public names: it imports from every floor
    return files


def imports(module: str, source: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = [*base, *filter(None, [node.module])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "_src":
            yield f"{ast.unparse(node.value)}._src"


def violation(module: str, target: str) -> str | None:
    """Why `module` must not import `target`, if so."""
    own = module.split(".")[1]
    root, *rest = target.split(".")
    if root in ("sharding", "configs"):
        return f"spell it jaxopt_llm.{root}: two spellings are two modules"
    if target.startswith("jax._src"):
        return "private"
    if module in HOST_ONLY and root in ("jax", "jaxlib", "flax"):
        return "runs on the host alone"
    if root != "jaxopt_llm" or rest[:1] == [own]:
        return None
    if own not in FLOOR:
        return f"{own} has no floor"
    height = FLOOR.get(rest[0] if rest else "", PUBLIC_NAMES)
    return None if height < FLOOR[own] else f"{own} is not above it"


def violations(module: str, source: str) -> list[str]:
    found = ((target, violation(module, target)) for target in imports(module, source))
    return [f"{module} imports {target}: {reason}" for target, reason in found if reason]


@pytest.mark.parametrize(("module", "path"), sources().items(), ids=sources())
def test_floors_are_kept(module, path):
    assert module.split(".")[1] in FLOOR, "give it a floor"
    assert violations(module, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxopt_llm.kernels.linear", "from jaxopt_llm import models"),
        ("jaxopt_llm.kernels.linear", "import jaxopt_llm.models.config"),
        ("jaxopt_llm.kernels.linear", "def f():\n    from jaxopt_llm.models.config import ModelConfig"),
        ("jaxopt_llm.kernels.linear", "from ..models import config"),
        ("jaxopt_llm.models.layers", "from jaxopt_llm.text import Tokenizer"),
        ("jaxopt_llm.models.layers", "import jaxopt_llm as jo"),
        ("jaxopt_llm.models.layers", "from jaxopt_llm import load"),
        ("jaxopt_llm.optimize.run", "from jaxopt_llm.configs import load"),
        ("jaxopt_llm.models.layers", "from sharding import rules"),
        ("jaxopt_llm.cli.env", "import configs.recipes"),
        ("jaxopt_llm.models.layers", "from jax._src import core"),
        ("jaxopt_llm.models.layers", "import jax\njax._src.core"),
        ("jaxopt_llm.engine.scheduler", "import jax.numpy as jnp"),
    ],
)
def test_violations_are_seen(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxopt_llm.models.layers", "from jaxopt_llm import kernels, sharding"),
        ("jaxopt_llm.models.layers", "from jaxopt_llm.models.config import ModelConfig"),
        ("jaxopt_llm.models.layers", "from .config import ModelConfig"),
        ("jaxopt_llm.cli.env", "from jaxopt_llm import configs, load"),
        ("jaxopt_llm.configs.launch.mine", "import jaxopt_llm as jo"),
        ("jaxopt_llm.engine.scheduler", "import numpy"),
    ],
)
def test_the_rest_is_free(module, source):
    assert violations(module, source) == []
