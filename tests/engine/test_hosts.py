"""Two processes give the tokens of one; one that is killed, or goes its own way, ends the other with a line."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

import jaxopt_llm as jo
from tests import processes
from tests.engine import hosts_program as program

PROGRAM = Path(program.__file__)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What both processes found."""
    folder = tmp_path_factory.mktemp("hosts")
    commands = [[*command, folder / str(command[2])] for command in processes.pair(PROGRAM, "tokens")]
    with processes.started(*commands) as running:
        for code, _, err in [processes.ended(process, timeout=200) for process in running]:
            assert (code, err) == (0, "")
    return [json.loads((folder / str(index)).read_text()) for index in range(processes.COUNT)]


@pytest.mark.parametrize("mesh", program.MESHES)
def test_the_tokens_of_one_process(told, mesh):
    """Of the same mesh on devices of one process."""
    here = program.alike(program.engine(mesh), whole=program.MESHES[mesh])
    for there in told:
        assert there[mesh].keys() == here.keys()
        for name in here.keys() & {"tokens", "texts", "streamed", "masked"}:
            assert there[mesh][name] == here[name], name
        for name in here.keys() & {"scores", "embedded"}:
            for one, other in zip(there[mesh][name], here[name], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
    assert here["streamed"] == here["texts"]
    assert all(token % 2 == 0 for token in here.get("masked", [0])[:4])


def test_drawn_seeds_are_the_same(told):
    first, second = (found["unseeded"] for found in told)
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == len(first)


def test_requests_of_process_0_alone(told):
    """As they come, with a function that only it has; some end early, one fails."""
    mesh = "data=2,tensor=4"
    found = told[0]["arrivals"]
    assert found["texts"] == told[0][mesh]["texts"]
    assert found["masked"] == told[0][mesh]["masked"]
    assert found["failed"] == "the function of allowed tokens failed: 'no grammar'"
    assert found["dropped"] == "cancelled"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(victim):
    with processes.started(*processes.pair(PROGRAM, "stream", "-")) as running:
        for process in running:
            while not process.stdout.readline().startswith(("'", '"')):
                assert process.poll() is None  # until the first chunk of a text
        assert [process.poll() for process in running] == [None, None]
        running[victim].kill()
        start = time.monotonic()
        code, _, err = processes.ended(running[1 - victim], timeout=60)
    assert code == 2
    assert processes.line(err) == (
        f"process {victim} at 127.0.0.1 has died; see what it says; all processes end, start all of them again"
    )
    assert err.count("\n") == 1  # nothing of JAX's beside it
    assert time.monotonic() - start < 30


def test_sizes_that_differ():
    with processes.started(*processes.pair(PROGRAM, "sizes", "-")) as (first, second):
        code, _, err = processes.ended(second)
        assert code == 2
        assert "this process has EngineConfig(max_slots=3, " in err
        assert "and process 0 has EngineConfig(max_slots=2, " in err
        code, _, err = processes.ended(first)
    assert code == 2
    assert processes.line(err).startswith("process 1 ended with ValueError: this process has EngineConfig(")


def test_one_that_asks_for_more_than_process_0():
    with processes.started(*processes.pair(PROGRAM, "divergent", "-")) as (first, second):
        code, _, err = processes.ended(second)
        assert code == 2
        assert "process 0 has ended its work and this process waits for more; every process must ask" in err
        code, _, err = processes.ended(first)
    assert code == 2
    assert processes.line(err).startswith("process 1 ended with ValueError: process 0 has ended its work")


def test_a_process_alone_follows_nobody():
    engine = jo.Engine(*jo.load(program.MODEL, mesh="tensor=8"), program.SIZES)
    with pytest.raises(ValueError, match=r"follow\(\) is for the processes after the first"):
        engine.follow()


def test_no_drafts(monkeypatch):
    """As if every device were of a process of its own."""
    monkeypatch.setattr("jaxopt_llm.engine.engine.spanned", len)
    model, tokenizer = jo.load(program.MODEL, mesh="tensor=8")
    with pytest.raises(ValueError, match=r"drafts are for one process: .* leave out draft and prompt_lookup"):
        jo.Engine(model, tokenizer, jo.EngineConfig(prompt_lookup=True))
