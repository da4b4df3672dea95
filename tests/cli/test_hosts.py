"""Commands in two processes: process 0 reads and prints what one process prints; the other says nothing."""

import pytest

from tests import processes

MODEL_OF_EIGHT = "--mesh=tensor=8"


def commands(*arguments):
    """Of both processes."""
    address = processes.free_address()
    together = [f"--coordinator={address}", f"--num_processes={processes.COUNT}", "--join_s=60"]
    return [
        ["-m", "jaxopt_llm", *arguments, MODEL_OF_EIGHT, *together, f"--process_id={index}"]
        for index in range(processes.COUNT)
    ]


def test_generate(run_cli, data_dir):
    arguments = ["generate", f"--model={data_dir / 'stories107K.gguf'}", "--prompt=Once", "--max_tokens=30"]
    alone = run_cli(*arguments, MODEL_OF_EIGHT)
    with processes.started(*commands(*arguments)) as (first, second):
        code, out, err = processes.ended(first)
        assert (code, out) == (0, alone.stdout), err
        assert "tokens in, 30 out (length)" in err
        code, out, _ = processes.ended(second)
    assert (code, out) == (0, "")


def test_eval(run_cli, data_dir):
    """Each process computes; one tells."""
    model, text = f"--model={data_dir / 'stories107K.gguf'}", f"--text={data_dir / 'wikitext.txt'}"
    arguments = ["eval", model, text, "--window=64", "--windows=2"]
    alone = run_cli(*arguments, MODEL_OF_EIGHT)
    with processes.started(*commands(*arguments)) as (first, second):
        assert processes.ended(first)[:2] == (0, alone.stdout)
        assert processes.ended(second)[:2] == (0, "")


def test_one_that_never_joins(data_dir):
    first, _ = commands("generate", f"--model={data_dir / 'stories107K.gguf'}", "--prompt=Once")
    with processes.started([*first, "--join_s=1"]) as (alone,):
        code, out, err = processes.ended(alone)
    assert (code, out) == (2, "")
    assert processes.line(err).startswith("process 1 of 2 has not joined at 127.0.0.1:")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--process_id=1"], "--process_id goes with --coordinator, the address of process 0, or auto"),
        (["--coordinator=auto"], "--coordinator spreads a model over all processes; say how with --mesh"),
        (["--coordinator=h:1", "--mesh=auto"], "coordinator=h:1 needs num_processes and process_id too"),
        (
            ["--coordinator=h:1", "--num_processes=1", "--process_id=0", "--mesh=tensor=4"],
            "--mesh=tensor=4 has 4 devices and all processes together 8; take as many",
        ),
    ],
)
def test_mistakes(run_cli, data_dir, arguments, line):
    done = run_cli("generate", f"--model={data_dir / 'stories107K.gguf'}", "--prompt=Once", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert line in done.stderr


def test_tasks_are_refused(run_cli):
    done = run_cli("eval", "--tasks=piqa", "--coordinator=auto", "--mesh=auto")
    assert done.code == 2
    assert "--tasks run in one process" in done.stderr
