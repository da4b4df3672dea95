"""The console script: help, exit codes and one clear line for a user's mistake."""

import errno
import importlib.util
import json
import subprocess
import sys
import types

import pytest
from absl import flags

from jaxopt_llm import cache
from jaxopt_llm.cli import flags as shared
from jaxopt_llm.cli import main

WRITTEN = [name for name, (module, _) in main.COMMANDS.items() if importlib.util.find_spec(module)]


@pytest.fixture
def probe(monkeypatch):
    """A command `probe` with two flags of its own and some shared; a test may replace its `main`."""
    module = types.ModuleType("probe", "What the probe does.")
    module.SHAPE = flags.DEFINE_enum("shape", "round", ["round", "square"], "Its shape.")
    module.SIZE = flags.DEFINE_integer("size", None, "Its size in cm.", required=True)
    module.MODEL, module.SAMPLING = shared.MODEL, shared.SAMPLING
    module.main = lambda argv: print(module.MODEL.value, module.SIZE.value, module.SHAPE.value)
    monkeypatch.setitem(sys.modules, "probe", module)
    monkeypatch.setitem(main.COMMANDS, "probe", ("probe", "probe things"))
    yield module
    del flags.FLAGS.shape, flags.FLAGS.size


def fails(done, message):
    """A user's mistake: exit code 2, nothing on stdout, one line on stderr that contains the message."""
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxopt-llm: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    return True


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",), ("--help", "env")])
def test_overview_lists_the_commands(run_cli, arguments):
    done = run_cli(*arguments)
    assert done.code == 0
    for name, (_, line) in main.COMMANDS.items():
        assert f"  {name:14}{line}\n" in done.stdout


@pytest.mark.parametrize("arguments", [("help", "probe"), ("probe", "--help"), ("probe", "--size=1", "-h")])
def test_help_of_a_command(run_cli, probe, arguments):
    done = run_cli(*arguments)
    assert done.code == 0
    assert done.stdout.startswith(
        "usage: jaxopt-llm probe [--flags]\n\nWhat the probe does.\n\nflags:\n  --size=INT\n"
    )
    assert "Its size in cm. (required)" in done.stdout
    assert "<round|square>: Its shape. (default: round)" in done.stdout
    assert "(default: smollm2-135m-instruct)" in done.stdout
    assert "Text that ends the generation; repeat this option" in done.stdout
    assert "--verbosity" not in done.stdout, "absl's own flag"
    assert "--out" not in done.stdout, "shared, but not the probe's"


@pytest.mark.parametrize("name", WRITTEN)
def test_every_command_has_help(run_cli, name):
    done = run_cli(name, "--help")
    assert done.code == 0
    assert done.stdout.startswith(f"usage: jaxopt-llm {name}")


def test_flags_reach_the_command_and_do_not_outlive_it(run_cli, probe):
    assert run_cli("probe", "--size=3", "--model", "m", "--shape=square").stdout == "m 3 square\n"
    assert run_cli("probe", "--size=4").stdout == "smollm2-135m-instruct 4 round\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prob"], "no command 'prob' (did you mean probe?)"),
        (["help", "prob"], "did you mean probe?"),
        (["--model=m", "probe"], "the command comes before its flags, not '--model=m'"),
        (["probe", "--size=1", "--modle=m"], "probe has no flag --modle (did you mean --model?)"),
        (["probe", "--size=1", "--out=x"], "probe has no flag --out"),
        (["probe", "--size=1", "--verbosity=1"], "probe has no flag --verbosity"),
        (["probe"], "probe needs --size"),
        (["probe", "--size=big"], "flag --size=big: invalid literal for int()"),
        (["probe", "--size"], "Missing value for flag --size"),
        (["probe", "--size=1", "--shape=oval"], "flag --shape=oval: value should be one of <round|square>"),
        (["probe", "--size=1", "--top_p=high"], "flag --top_p=high: could not convert"),
        (["probe", "--size=1", "file.txt"], "probe takes flags only, not 'file.txt'"),
        (["probe", "--size=1", "--", "--help"], "probe takes flags only, not '--help'"),
    ],
)
def test_mistakes_in_flags(run_cli, probe, arguments, message):
    assert fails(run_cli(*arguments), message)


def test_arguments_beside_flags_reach_a_command_that_takes_them(run_cli, probe):
    probe.ARGUMENTS = "THING [THING ...]"
    probe.main = lambda argv: print(argv, probe.SIZE.value)
    assert run_cli("probe", "a", "--size=3", "b").stdout == "['jaxopt-llm probe', 'a', 'b'] 3\n"
    assert run_cli("probe", "--help").stdout.startswith(
        "usage: jaxopt-llm probe THING [THING ...] [--flags]\n"
    )


def raising(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("top_p=2.0 must be in (0, 1]"), "error: top_p=2.0 must be in (0, 1]\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b.gguf"), "error: a/b.gguf: No such file\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_mistakes_that_a_command_finds(run_cli, probe, error, message):
    probe.main = raising(error)
    assert fails(run_cli("probe", "--size=1"), message)


def test_a_list_of_problems_is_kept_whole(run_cli, probe):
    probe.main = raising(ValueError("3 tensors do not fit:\n  missing a\n  missing b"))
    done = run_cli("probe", "--size=1")
    assert done.code == 2
    assert done.stderr == "jaxopt-llm: error: 3 tensors do not fit:\n  missing a\n  missing b\n"


def test_bugs_pass_through(run_cli, probe, monkeypatch):
    probe.main = raising(KeyError("a bug"))
    with pytest.raises(KeyError):
        run_cli("probe", "--size=1")
    probe.main = raising(ValueError("whose?"))
    monkeypatch.setenv("JAXOPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="whose"):
        run_cli("probe", "--size=1")


def test_interrupted(run_cli, probe):
    probe.main = raising(KeyboardInterrupt())
    assert run_cli("probe", "--size=1").code == 130


def test_a_reader_that_leaves_is_told_nothing():
    """As in `jaxopt-llm ... | head`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxopt_llm", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("arguments", ["--help", "env --help", "evn", "env --jsn"])
def test_help_and_mistakes_need_no_jax(arguments):
    """Start-up is short: neither JAX nor what imports it is loaded until a command runs."""
    code = (
        "import sys; from jaxopt_llm.cli.main import run; run(sys.argv[1:]); "
        "sys.exit(str({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


def test_env(run_cli):
    done = run_cli("env", "--json")
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.code == 0
    assert report["platform"] == "cpu"
    assert report["cpu"]
    assert {"jax", "jaxopt-llm", "kernels", "devices", "cache"} <= report.keys()
    assert run_cli("env").stdout.startswith("jaxopt-llm")


def test_compiled_programs_are_kept_where_the_user_says(run_cli, tmp_path, monkeypatch):
    def folder():
        return json.loads(run_cli.subprocess("env", "--json").stdout)["compiled_programs"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert folder() == str(tmp_path / "mine")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert folder().startswith(str(tmp_path / "jaxopt_llm" / "xla"))


def test_each_kind_of_processor_has_its_own_programs(monkeypatch, tmp_path):
    here = cache.program_folder(tmp_path)
    monkeypatch.setattr(cache, "cpu", lambda: ("another", ("avx2",)))
    assert cache.program_folder(tmp_path) != here
