"""Processes on several hosts that run one program: how they meet.

Where the address of process 0 is given they meet there, before JAX's own service takes its place: JAX aborts where one
does not come, and cannot say which. Where JAX finds the others itself they meet after that.
"""

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxopt_llm.sharding.link import END, Link, peer_name

AUTO = "auto"
JOIN_S = 300  # for all to be there
_HEARTBEAT_S = 50  # of JAX's service: after our own, and still within the minute
_HELLO = struct.Struct(">8sII")  # name, process, how many
_NAME, _WELCOME = b"jaxopt01", b"W"

_found: list[Link] = []  # of this process, one at most: as JAX's distributed service


def connect(
    coordinator: str = AUTO,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = JOIN_S,
) -> Link | None:
    """Makes this process one of several that use all their devices together; before JAX touches any device.

    Args:
      coordinator: `host:port` of process 0, where all the others reach it; "auto" where JAX finds the rest itself
        (Cloud TPU, GKE, Slurm, Open MPI).
      num_processes, process_id: how many there are, and which this is; with `host:port` alone.
      timeout_s: for all of them to be there.

    Returns:
      the link to the others; None if there are none.

    Raises:
      ValueError: for an address that is none, a process that does not come in time, or "auto" where nothing is found.
    """
    if _found:
        raise ValueError("the processes are connected already; connect once, before anything else")
    # JAX's would catch SIGTERM, which then ends nothing.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise ValueError("coordinator=auto finds num_processes and process_id itself; leave them out")
        _offer_transfers(_own_addresses()[0])
        _initialize(f"not all processes have joined within {timeout_s:.0f} s; start all of them", timeout_s)
        return link()
    host, port = _address(coordinator)
    count, index = _numbers(coordinator, num_processes, process_id)
    if count == 1:
        return None
    until = time.monotonic() + timeout_s
    found = _gather(host, port, count, until) if index == 0 else _join([(host, port)], index, count, until)
    _offer_transfers(host if _is_loopback(host) else _own_addresses()[0])
    _initialize(
        f"JAX's service at {coordinator} does not answer; see whether the port is free on process 0",
        60.0,
        coordinator_address=coordinator if index == 0 else _relayed((host, port)),
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
        **({"coordinator_bind_address": coordinator} if _is_loopback(host) else {}),
    )
    _found.append(found.start())
    return found


def link() -> Link | None:
    """The one of this process; None where there is one process alone.

    JAX's service may have been started without `connect`: then every process must first ask at the same point.
    """
    if jax.process_count() == 1:
        return None
    if not _found:
        _found.append(_meet().start())
    return _found[0]


def absent(shape: tuple[int, ...], dtype: Any, where: Sharding) -> jax.Array:
    """What this process knows of an array that lies on devices of others alone: `jax.device_put` may bring it here."""
    return jax.make_array_from_single_device_arrays(shape, where, [], dtype=dtype)


def spanned(devices: Iterable[jax.Device]) -> int:
    """Over how many processes devices are spread."""
    return len({device.process_index for device in devices})


def _offer_transfers(host: str) -> None:
    """Lets devices of other processes fetch arrays from here, where their platform has no way of its own."""
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    jax.config.update("jax_cross_host_transfer_socket_address", f"{host}:{port}")


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator={coordinator} must be auto, or host:port, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _numbers(coordinator: str, count: int | None, index: int | None) -> tuple[int, int]:
    if count is None or index is None:
        raise ValueError(f"coordinator={coordinator} needs num_processes and process_id too")
    if not 0 <= index < count:
        raise ValueError(f"process_id={index} must be one of 0 to {count - 1}: num_processes={count}")
    return count, index


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def _initialize(late: str, timeout_s: float, **where: Any) -> None:
    """JAX's own; where it is late JAX would abort, so this process ends a little before, with a line that says why."""

    def end() -> None:
        os.write(2, f"jaxopt-llm: error: {late}\n".encode())
        os._exit(2)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=int(timeout_s) + 30, heartbeat_timeout_seconds=_HEARTBEAT_S
        )
    except ValueError:
        raise ValueError(
            "coordinator=auto found no cluster (Cloud TPU, GKE, Slurm, Open MPI) that says which processes "
            "there are; give host:port of process 0, num_processes and process_id"
        ) from None
    except RuntimeError as error:
        raise ValueError(f"JAX's distributed service did not start: {error}") from None
    finally:
        timer.cancel()


def _gather(host: str, port: int, count: int, until: float) -> Link:
    """Process 0's side, on the port that JAX's service takes next."""
    try:
        server = socket.create_server((host if _is_loopback(host) else "", port), backlog=count)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {host}:{port}: {error.strerror}; choose another port"
        ) from None
    with server:
        return _welcome(server, f"{host}:{port}", count, until)


def _welcome(server: socket.socket, address: str, count: int, until: float) -> Link:
    joined: dict[int, Connection] = {}
    try:
        while len(joined) < count - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                known = _greet(server.accept()[0])
            except TimeoutError:
                missing = [process for process in range(1, count) if process not in joined]
                several = f"processes {', '.join(map(str, missing))} of {count} have"
                who = several if len(missing) > 1 else f"process {missing[0]} of {count} has"
                raise ValueError(
                    f"{who} not joined at {address}; start all with coordinator={address} and "
                    f"num_processes={count}, each with its process_id"
                ) from None
            if known is None:
                continue
            process, theirs, connection = known
            if theirs != count or not 0 < process < count or process in joined:
                joined.setdefault(process, connection)
                raise ValueError(
                    f"{peer_name(connection)} joined as process_id={process} of num_processes={theirs}, and process 0 "
                    f"has num_processes={count}; each process_id may come once"
                )
            joined[process] = connection
    except ValueError as error:
        for connection in joined.values():
            with contextlib.suppress(OSError):
                connection.send_bytes(END + str(error).encode())
        raise
    for connection in joined.values():
        connection.send_bytes(_WELCOME)
    return Link(0, count, joined)


def _greet(client: socket.socket) -> tuple[int, int, Connection] | None:
    """Who it is, as which of how many; None if it is none of ours."""
    client.settimeout(5)
    try:
        name, process, count = _HELLO.unpack(client.recv(_HELLO.size, socket.MSG_WAITALL))
    except (OSError, struct.error):
        name = b""
    if name != _NAME:
        client.close()
        return None
    return process, count, _connection(client)


def _join(addresses: list[tuple[str, int]], index: int, count: int, until: float) -> Link:
    """The others' side."""
    names = " or ".join(f"{host}:{port}" for host, port in addresses)
    for host, port in _again(addresses, until):
        with contextlib.suppress(OSError):
            client = socket.create_connection((host, port), timeout=5)
            client.sendall(_HELLO.pack(_NAME, index, count))
            connection = _connection(client)
            break
    else:
        raise ValueError(
            f"process 0 does not answer at {names}; start it there with process_id=0, or mend the address"
        )
    try:
        answer = connection.recv_bytes() if connection.poll(until - time.monotonic() + 5) else b""
    except (EOFError, OSError):
        answer = b""
    if answer == _WELCOME:
        return Link(index, count, {0: connection})
    why = answer[1:].decode() or f"process 0 at {names} has ended, or waits for others"
    raise ValueError(f"{why} (told to process {index})" if answer else why)


def _relayed(service: tuple[str, int]) -> str:
    """An address of this process that leads to JAX's service, and stays open when that is gone.

    JAX aborts at once, with pages of its own, where its connection breaks off: before anybody can say who has died.
    """
    door = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, *, ends: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        if ends:
            sink.close()

    def serve() -> None:
        while True:
            inside = door.accept()[0]
            with contextlib.suppress(OSError):  # JAX tries again
                outside = socket.create_connection(service, timeout=5)
                outside.settimeout(None)
                for source, sink, ends in ((inside, outside, True), (outside, inside, False)):
                    options = {"ends": ends}
                    threading.Thread(target=pump, args=(source, sink), kwargs=options, daemon=True).start()
                continue
            inside.close()

    threading.Thread(target=serve, name="jaxopt_llm_relay", daemon=True).start()
    return f"127.0.0.1:{door.getsockname()[1]}"


def _again(addresses: list[tuple[str, int]], until: float) -> Iterator[tuple[str, int]]:
    while time.monotonic() < until:
        yield from addresses
        time.sleep(0.1)


def _meet() -> Link:
    """Where JAX's service runs already: process 0 tells over the devices where it listens."""
    index, count, until = jax.process_index(), jax.process_count(), time.monotonic() + 60
    told = np.zeros(1024, np.uint8)
    server = socket.create_server(("", 0), backlog=count) if index == 0 else None
    if server:
        text = json.dumps([(host, server.getsockname()[1]) for host in _own_addresses()]).encode()[
            : told.size
        ]
        told[: len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    addresses = [(host, port) for host, port in json.loads(told.tobytes().rstrip(b"\0"))]
    if server is None:
        return _join(addresses, index, count, until)
    with server:
        return _welcome(server, " or ".join(f"{host}:{port}" for host, port in addresses), count, until)


def _own_addresses() -> list[str]:
    """Of this host, the one that leads outside first."""
    found: list[str] = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks the system which way it would go
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _connection(client: socket.socket) -> Connection:
    client.settimeout(None)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(client.detach())
