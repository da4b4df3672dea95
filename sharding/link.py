"""What processes tell each other beside the devices, and how one notices that another is gone.

Process 0 has a connection to each of the others. A process that dies, or is not heard of for half a minute, ends all of
them with one line on stderr and exit code 2, wherever they wait. JAX's own service would abort them later, and not say
why.
"""

import atexit
import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import Self

_PING_S, _SILENCE_S = 5.0, 30.0
_GRACE_S = 2.0  # for the same mistake to be found in every process, each of which then tells it itself
_GOING_S = 5.0  # for those that were told to end
_PING, _MESSAGE, _DONE, _OVER, END = b"P", b"M", b"D", b"O", b"E"  # how messages begin


class Link:
    """Of one process to the others; made by `connect`. As a context it ends with `leave`, as Python's exit does.

    Attributes:
      index: of this process.
      count: of all.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, Connection]):
        self.index, self.count = index, count
        self._connections = dict(connections)  # by process
        self._names = {process: peer_name(connection) for process, connection in connections.items()}
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
        self._code = (
            2
            if isinstance(error, ValueError | OSError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        )
        self._ending.set()
        words = " ".join(str(error).split())
        self._dismiss(f"process {self.index} ended with {type(error).__name__}: {words}"[:2000])

    def _await_all(self) -> None:
        others = set(self._connections)
        while not (self._over.is_set() or (self.index == 0 and self._left >= others)):
            self._over.wait(0.02)  # as long as they live: who dies, or falls silent, is noticed in `_watch`
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
                self._end(
                    f"{who} was not heard of for {_SILENCE_S:.0f} s; see whether it or its host is down"
                )

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
        elif kind == END and not self._ending.is_set():
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
        sender = threading.Thread(target=self._tell, args=(END + why.encode(),), daemon=True)
        if self.index == 0:  # JAX's service ends with this process: who has not left by then aborts
            sender.start()
            while self._open and time.monotonic() < until:
                self._hear(0.1, heard)
        os._exit(2)

    def _dismiss(self, why: str) -> None:
        """As `_end`, from the thread that leaves with an error of its own."""
        self._tell(END + why.encode())
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


def peer_name(connection: Connection) -> str:
    """The address at the other end."""
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        return str(peer.getpeername()[0])


def _flush() -> None:
    """What was printed; for a second at most, since the thread that ends may hold the streams."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(1)
