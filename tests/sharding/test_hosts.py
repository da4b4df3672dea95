"""How processes meet, talk, notice that one is gone, and end."""

import signal
import socket
import threading
import time

import pytest

from jaxopt_llm.sharding import hosts
from tests import processes

CONNECT = """
import os, sys, time
from jaxopt_llm.sharding import hosts
address, index, *rest = sys.argv[1:]
index = int(index)
"""
TALK = (
    CONNECT
    + """
with hosts.connect(address, 2, index, timeout_s=30) as link:
    import jax
    devices = jax.process_count(), jax.device_count(), jax.local_device_count()  # they meet here
    first, second = link.channel(), link.channel()
    if index == 0:
        for number in range(3):
            second.send(b"b%d" % number)
            first.send(b"a%d" % number)
        time.sleep(1.5)  # the other's work is done long before
    else:
        print([first.receive(timeout_s=20) for _ in range(3)], [second.receive(timeout_s=20) for _ in range(3)])
        print(first.receive(timeout_s=0.01))
        if rest == ["to the end"]:
            try:
                while first.receive(timeout_s=20) is None:
                    pass
            except EOFError as error:
                print(error)
    print(*devices)
"""
)


@pytest.mark.parametrize("last", [0, 1])
def test_they_talk_and_end_in_any_order(last):
    arguments = ["to the end"] if last else []
    with processes.started(*processes.pair(TALK, *arguments)) as (first, second):
        assert processes.ended(first) == (0, "2 8 4\n", "")
        code, out, err = processes.ended(second)
    assert (code, err) == (0, "")
    said = "[b'a0', b'a1', b'a2'] [b'b0', b'b1', b'b2']\nNone\n"
    assert out == said + ("process 0 has ended its work\n" if last else "") + "2 8 4\n"


def test_a_mistake_in_one_ends_the_other():
    program = CONNECT + (
        "with hosts.connect(address, 2, index, timeout_s=30):\n"
        "    if index == 1: raise ValueError('seven of them are missing')\n"
        "    time.sleep(60)"
    )
    with processes.started(*processes.pair(program)) as (first, second):
        code, _, err = processes.ended(first, timeout=40)
        assert code == 2
        assert processes.line(err).startswith(
            "process 1 ended with ValueError: seven of them are missing; all"
        )
        code, _, err = processes.ended(second, timeout=40)
    assert code == 2
    assert err.rstrip().endswith("ValueError: seven of them are missing")


def test_a_process_that_says_nothing_for_long_counts_as_dead():
    program = CONNECT + (
        "from jaxopt_llm.sharding import link\n"
        "link._PING_S, link._SILENCE_S = 0.3, 2.0\n"
        "hosts.connect(address, 2, index, timeout_s=30)\n"
        "print('there')\n"
        "time.sleep(60)"
    )
    with processes.started(*processes.pair(program)) as (first, second):
        for process in (first, second):
            assert process.stdout.readline() == "there\n"
        time.sleep(2.5)  # while both speak, nobody is missed
        assert (first.poll(), second.poll()) == (None, None)
        second.send_signal(signal.SIGSTOP)
        code, _, err = processes.ended(first, timeout=30)
    assert code == 2
    assert processes.line(err).startswith(
        "process 1 at 127.0.0.1 was not heard of for 2 s; see whether it or"
    )


AUTO = CONNECT + (
    "link = hosts.connect('auto', timeout_s=float(rest[0]))\n"
    "channel = link.channel()\n"
    "channel.send(b'hello') if index == 0 else print(channel.receive(timeout_s=20))"
)


def slurm():
    """What a job of two processes finds in its environment; all but which one it is."""
    port = processes.free_address().partition(":")[2]
    names = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    return names | {"JAX_COORDINATOR_PORT": port}


def test_slurm_says_who_there_is():
    commands, env = processes.pair(AUTO, 60), slurm()
    with (
        processes.started(commands[0], **env, SLURM_PROCID="0", SLURM_LOCALID="0") as (first,),
        processes.started(commands[1], **env, SLURM_PROCID="1", SLURM_LOCALID="1") as (second,),
    ):
        code, _, err = processes.ended(first)
        assert (code, err) == (0, "")
        code, out, err = processes.ended(second)
    assert (code, err) == (0, "")
    assert "b'hello'" in out.splitlines()


@pytest.mark.parametrize("index", [0, 1])
def test_who_never_joins_where_jax_finds_them(index):
    """JAX would abort."""
    here = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    with processes.started(processes.pair(AUTO, 1)[index], **slurm(), **here) as (alone,):
        code, _, err = processes.ended(alone)
    assert code == 2
    assert err == "jaxopt-llm: error: not all processes have joined within 1 s; start all of them\n"


def test_who_never_joins_is_named():
    address = processes.free_address()
    with pytest.raises(ValueError, match=f"processes 1, 2 of 3 have not joined at {address}; start all with"):
        hosts.connect(address, 3, 0, timeout_s=0.3)
    with pytest.raises(ValueError, match="process 1 of 2 has not joined"):
        hosts.connect(address, 2, 0, timeout_s=0.3)
    with pytest.raises(ValueError, match=f"process 0 does not answer at {address}; start it there with"):
        hosts.connect(address, 3, 1, timeout_s=0.3)


@pytest.mark.parametrize(
    ("index", "count", "line"),
    [
        (1, 3, "joined as process_id=1 of num_processes=3, and process 0 has num_processes=2"),
        (5, 6, "joined as process_id=5 of num_processes=6, and process 0 has num_processes=2"),
    ],
)
def test_numbers_that_disagree(index, count, line):
    """Both are told."""
    address, told = processes.free_address(), []

    def join():
        try:
            hosts.connect(address, count, index, timeout_s=10)
        except ValueError as error:
            told.append(str(error))

    other = threading.Thread(target=join)
    other.start()
    with pytest.raises(ValueError, match=line):
        hosts.connect(address, 2, 0, timeout_s=10)
    other.join()
    assert line in told[0]


def test_strangers_are_sent_away():
    host, port = processes.free_address().split(":")
    seen = []

    def knock():
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    seen.append(stranger.recv(10))
                    return
            except ConnectionRefusedError:
                time.sleep(0.02)
            except ConnectionResetError:
                seen.append(b"")
                return

    other = threading.Thread(target=knock)
    other.start()
    with pytest.raises(ValueError, match="process 1 of 2 has not joined"):
        hosts.connect(f"{host}:{port}", 2, 0, timeout_s=1.5)
    other.join()
    assert seen == [b""]


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"process 0 cannot listen at 127.0.0.1:{port}: .* another port"):
            hosts.connect(f"127.0.0.1:{port}", 2, 0, timeout_s=1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "coordinator=nowhere must be auto, or host:port, such as 10.0.0.1:8476"),
        (["h:0", 2, 0], "coordinator=h:0 must be"),
        (["h:70000", 2, 0], "coordinator=h:70000 must be"),
        (["h:1"], "coordinator=h:1 needs num_processes and process_id too"),
        (["h:1", 2], "needs num_processes and process_id too"),
        (["h:1", 2, 2], "process_id=2 must be one of 0 to 1: num_processes=2"),
        (["h:1", 2, -1], "process_id=-1 must be one of 0 to 1"),
        (["auto", 2], "finds num_processes and process_id itself; leave them out"),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(ValueError, match=line):
        hosts.connect(*arguments)


def test_one_process_has_nobody_to_meet():
    assert hosts.connect("h:1", 1, 0) is None
    assert hosts.link() is None
