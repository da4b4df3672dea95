"""Every test runs on eight forced host devices, with strict dtypes and ranks and with shapes checked."""

import contextlib
import dataclasses
import gc
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

from jaxopt_llm import cache

ROOT = Path(__file__).parents[1]
_MOST_MAPS = 20_000

# Before JAX is imported; the subprocesses of tests inherit it.
cache.prepare(Path(os.environ.get("JAXOPT_TEST_CACHE", ROOT / ".cache" / "xla")))
# Tests compile far more than they compute: without optimisation LLVM takes half the time.
# And eight devices on a busy machine may take longer to meet than the 40 s after which XLA ends the process.
_XLA = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_XLA])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

assert "jax" not in sys.modules, "importing jaxopt_llm.cache, or a pytest plugin, imported JAX"

import jax  # noqa: E402

from tests import typechecker  # noqa: E402

# Before the rest of the package is imported: annotated shapes and types are checked at each call.
jaxtyping.install_import_hook("jaxopt_llm", f"{typechecker.__name__}.check")

from jaxopt_llm.cli import main  # noqa: E402

# In this process alone: a command that runs in its own behaves as it does for a user.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    # JAX writes its cache in place: a reader beside the writer finds half a program, says so and compiles
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache")


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Each compiled program takes seven of the 65,530 memory maps that Linux allows; without, XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """What is committed: a tiny trained model and a slice of wikitext."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The larger files that some tests read: `$JAXOPT_DATA`, else `../shared` beside the checkout."""
    folder = Path(os.environ.get("JAXOPT_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the larger files: set JAXOPT_DATA ({folder} is no directory)")
    return folder


@dataclasses.dataclass(frozen=True)
class Completed:
    """What a command left: its exit code and all that it printed."""

    code: int
    stdout: str
    stderr: str


class CommandLine:
    """Runs `jaxopt-llm`: called, in this process; `subprocess` in one of its own."""

    def __call__(self, *arguments: str | Path) -> Completed:
        with (
            contextlib.redirect_stdout(io.StringIO()) as stdout,
            contextlib.redirect_stderr(io.StringIO()) as stderr,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a command may exchange its process's
            code = main.run([str(argument) for argument in arguments])
        return Completed(code, stdout.getvalue(), stderr.getvalue())

    def subprocess(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> Completed:
        done = subprocess.run(
            [sys.executable, "-m", "jaxopt_llm", *map(str, arguments)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Completed(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations go unchecked, as they do for a user: what a wrong type then meets is our own code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def run_cli() -> CommandLine:
    return CommandLine()
