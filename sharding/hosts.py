"""Processes on several hosts that run one program: how they meet, talk beside the devices, and notice who is gone.

Process 0 has a connection to each of the others. What is sent over it touches no device. A process that dies, or is not
heard of for half a minute, ends all the others with one line on stderr and exit code 2, wherever they wait; JAX's own
service would abort them later, without a word about why.
"""

import atexit
import contextlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

AUTO = "auto"
JOIN_S = 300  # for all to be there
_PING_S, _SILENCE_S = 5.0, 30.0
_HEARTBEAT_S = 50  # of JAX's service: after us, and still within the minute
_GRACE_S = 2.0  # for the same mistake to be found in every process, each of which then tells it itself
_GOING_S = 5.0  # for those that were told to end
_END_S = 300.0  # that one whose work is done waits for the others
_HELLO = struct.Struct(">8sII")  # name, process, how many
_NAME = b"jaxopt01"
_PING, _MESSAGE, _DONE, _OVER, _END, _WELCOME = b"P", b"M", b"D", b"O", b"E", b"W"

_found: list["Link"] = []  # of this process, one at most: as JAX's distributed service


class Link:
    """Of one process to the others; made by `connect`. As a context it ends with `leave`, as Python's exit does.

    Attributes:
      index: of this process.
      count: of all.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, Connection]):
        self.index, self.count = index, count
        self._connections = dict(connections)  # by process
        self._names = {process: _name(connection) for process, connection in connections.items()}
        self._open = set(connections)
        self._locks = {process: threading.Lock() for process in connections}
        self._inbox: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._channels = 0
        self._left: set[int] = set()  # whose work is done
        self._ending, self._over = threading.Event(), threading.Event()
        self._code: int | None = None

    def start(self) -> Self:
        """Listens from now on."""
        for work in (self._watch, self._ping):
            threading.Thread(target=work, name="jaxopt_llm_hosts", daemon=True).start()
        atexit.register(self._at_exit)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.leave(None if isinstance(error, SystemExit) and not error.code else error)

    def channel(self) -> "Channel":
        """A new one; the n-th of each process belong together."""
        self._channels += 1
        return Channel(self, self._channels)

    def send(self, channel: int, message: bytes) -> None:
        """From process 0 to all others, in order."""
        self._tell(_MESSAGE + channel.to_bytes(4) + message)

    def receive(self, channel: int, *, timeout_s: float) -> bytes | None:
        """The next message of process 0; None if none comes in time.

        Raises:
          EOFError: if that process's work is done.
        """
        inbox = self._box(channel)
        try:
            message = inbox.get(timeout=0 if 0 in self._left and inbox.empty() else timeout_s)
        except queue.Empty:
            message = None
        if message is None and 0 in self._left and inbox.empty():
            raise EOFError("process 0 has ended its work")
        return message

    def settle(self) -> None:
        """Gives the others' deaths a moment to be noticed: this process then ends here. For errors of collectives."""
        time.sleep(_GRACE_S)

    def leave(self, error: BaseException | None = None) -> None:
        """This process's work is done: waits until that of all is; or it failed, and the others end too."""
        if self._over.is_set() or self._ending.is_set():
            return
        if error is None:
            self._tell(_DONE)
            self._await_all()
            return
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):
            self.settle()
        self._code = 2 if isinstance(error, ValueError | OSError) else 130 if _interrupt(error) else 1
        self._ending.set()
        words = " ".join(str(error).split())
        self._dismiss(f"process {self.index} ended with {type(error).__name__}: {words}"[:2000])

    def _await_all(self) -> None:
        others = set(self._connections)
        late = time.monotonic() + _END_S
        while not (self._over.is_set() or (self.index == 0 and self._left >= others)):
            if time.monotonic() > late:
                missing = f"process {min(others - self._left)}" if self.index == 0 else "others"
                self.leave(TimeoutError(f"waited {_END_S:.0f} s for {missing} to end its work"))
                return
            self._over.wait(0.02)
        self._over.set()
        self._tell(_OVER)

    def _at_exit(self) -> None:
        """Before JAX's own, which meets the others once more: it must not where they are gone."""
        self.leave(getattr(sys, "last_value", None))
        if self._code is not None:
            _flush()
            os._exit(self._code)
        if self._ending.is_set():
            time.sleep(2 * _GOING_S)  # the thread that listens is about to end this process

    def _tell(self, message: bytes) -> None:
        for process in sorted(self._open):
            with self._locks[process], contextlib.suppress(OSError):  # who is gone is noticed in `_watch`
                self._connections[process].send_bytes(message)

    def _ping(self) -> None:
        while not self._over.wait(_PING_S):
            self._tell(_PING)

    def _watch(self) -> None:
        heard = dict.fromkeys(self._open, time.monotonic())
        while self._open:
            self._hear(_PING_S, heard)
            silent = [p for p in self._open - self._left if time.monotonic() - heard[p] > _SILENCE_S]
            if silent and not self._ending.is_set():
                self._open.discard(silent[0])  # nobody waits for it to end
                who = f"process {silent[0]} at {self._names[silent[0]]}"
                self._end(f"{who} was not heard of for {_SILENCE_S:.0f} s; see whether it or its host is down")

    def _hear(self, timeout_s: float, heard: dict[int, float]) -> None:
        """What comes within the time."""
        processes = {self._connections[process]: process for process in self._open}
        for connection in wait(list(processes), timeout_s):
            assert isinstance(connection, Connection)
            process = processes[connection]
            try:
                self._take(process, connection.recv_bytes())
                heard[process] = time.monotonic()
            except (EOFError, OSError):
                self._open.discard(process)
                if not (self._ending.is_set() or self._over.is_set()):
                    self._end(f"process {process} at {self._names[process]} has died; see what it says")

    def _take(self, process: int, message: bytes) -> None:
        kind, body = message[:1], message[1:]
        if kind == _MESSAGE:
            self._box(int.from_bytes(body[:4])).put(body[4:])
        elif kind == _DONE:
            self._left.add(process)
            for inbox in list(self._inbox.values()):
                inbox.put(None)
        elif kind == _OVER:
            self._over.set()
        elif kind == _END and not self._ending.is_set():
            if self.index == 0:
                self._tell(message)
            if not self._ending.wait(_GRACE_S):
                self._end(body.decode())

    def _box(self, channel: int) -> "queue.SimpleQueue[bytes | None]":
        return self._inbox.setdefault(channel, queue.SimpleQueue())

    def _end(self, why: str) -> None:
        """Of this process, from the thread that listens; the one that waits for a device cannot be told."""
        self._ending.set()
        _flush()
        os.write(2, f"jaxopt-llm: error: {why}; all processes end, start all of them again\n".encode())
        until, heard = time.monotonic() + _GOING_S, dict[int, float]()
        sender = threading.Thread(target=self._tell, args=(_END + why.encode(),), daemon=True)
        if self.index == 0:  # JAX's service ends with this process: who has not left by then aborts
            sender.start()
            while self._open and time.monotonic() < until:
                self._hear(0.1, heard)
        os._exit(2)

    def _dismiss(self, why: str) -> None:
        """As `_end`, from the thread that leaves with an error of its own."""
        self._tell(_END + why.encode())
        until = time.monotonic() + _GOING_S
        while self.index == 0 and self._open and time.monotonic() < until:
            time.sleep(0.02)


class Channel:
    """Messages from process 0 to all others."""

    def __init__(self, link: Link, number: int):
        self.link, self._number = link, number

    def send(self, message: bytes) -> None:
        """As `Link.send`."""
        self.link.send(self._number, message)

    def receive(self, *, timeout_s: float) -> bytes | None:
        """As `Link.receive`."""
        return self.link.receive(self._number, timeout_s=timeout_s)


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
        _initialize(f"not all processes have joined within {timeout_s:.0f} s; start all of them", timeout_s)
        return link()
    host, port = _address(coordinator)
    count, index = _numbers(coordinator, num_processes, process_id)
    if count == 1:
        return None
    until = time.monotonic() + timeout_s
    found = _gather(host, port, count, until) if index == 0 else _join([(host, port)], index, count, until)
    _initialize(
        f"JAX's service at {coordinator} does not answer; see whether the port is free on process 0",
        60.0,
        coordinator_address=coordinator,
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


def spanned(mesh: Mesh | None) -> int:
    """Over how many processes a mesh reaches."""
    return 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})


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
                    f"{_name(connection)} joined as process_id={process} of num_processes={theirs}, and process 0 "
                    f"has num_processes={count}; each process_id may come once"
                )
            joined[process] = connection
    except ValueError as error:
        for connection in joined.values():
            with contextlib.suppress(OSError):
                connection.send_bytes(_END + str(error).encode())
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
        text = json.dumps([(host, server.getsockname()[1]) for host in _own_addresses()]).encode()[: told.size]
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


def _name(connection: Connection) -> str:
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        return str(peer.getpeername()[0])


def _interrupt(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


def _flush() -> None:
    """What was printed; for a second at most, since the thread that ends may hold the streams."""
    flush: Callable[[], None] = lambda: [stream.flush() for stream in (sys.stdout, sys.stderr)] and None
    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1)
