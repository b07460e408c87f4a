"""The replica processes of one group: started together, heard, and ended within bounded time."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from .. import _C
from ..errors import PeerDeadError, UsageError
from . import protocol

Target = Callable[[dict[str, Any], Connection], None]
#: Makes a rendezvous store in the launcher; returns it (kept alive for the group), its host and its port.
MakeStore = Callable[[], tuple[object, str, int]]

CLOSE_S = 10.0  # for replicas to close by themselves
_CLOSED = "its connection is closed"
_KILL_S = 5.0  # for the kernel to end a killed process


@dataclass
class Replica:
    """One replica as the launcher sees it. ``heard``: monotonic seconds of its last sign of progress."""

    rank: int
    process: ForkServerProcess
    connection: Connection
    pid: int
    heard: float
    alive: bool = True
    ready: bool = False
    words: str = ""  # why it is not alive
    memory: dict[str, int] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0
    busy_s: float = 0.0


def start_fork_server(preload: Sequence[str]) -> None:
    """Starts the process that replicas are forked from, so that its imports run beside what the launcher does next."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    forkserver.ensure_running()


def default_store() -> tuple[object, str, int]:
    """A store in this process: no replica's death, rank 0's included, takes it away."""
    from .. import _torch

    return _torch.make_store_server()


class ReplicaSet:
    """``world_size`` processes running ``target(settings, connection)``, with a fresh token and store.

    ``deadline_ms`` bounds each send to and receive from a replica, which may be stopped in the middle.
    """

    def __init__(
        self,
        world_size: int,
        settings: dict[str, Any],
        target: Target,
        *,
        deadline_ms: int,
        make_store: MakeStore = default_store,
        close_s: float = CLOSE_S,
    ) -> None:
        self.world_size = world_size
        # Names of shared memory derive from it: they can be removed without asking anybody.
        self.token = secrets.token_hex(16)
        self.replicas: list[Replica] = []
        self._deadline_ms = deadline_ms
        self._close_s = close_s
        self._store, host, port = make_store()
        try:
            for rank in range(world_size):
                own = {"rank": rank, "world_size": world_size, "token": self.token}
                self._start(target, {**settings, **own, "store_host": host, "store_port": port})
        except BaseException:
            self.end(graceful=False)
            raise

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.alive]

    def _start(self, target: Target, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        rank = settings["rank"]
        mine, theirs = context.Pipe(duplex=True)
        _bound(mine, self._deadline_ms)
        process = context.Process(target=target, args=(settings, theirs), name=f"sidp-replica-{rank}", daemon=True)
        try:
            process.start()
        except (OSError, EOFError) as error:
            mine.close()
            raise PeerDeadError(
                f"replica {rank} cannot be started: {error!r}; the fork server may have been killed: start again",
                rank=rank,
            ) from error
        finally:
            theirs.close()  # ours alone would keep it open, and its end would go unnoticed
        self.replicas.append(Replica(rank, process, mine, process.pid or 0, time.monotonic()))

    def send(self, replica: Replica, kind: str, **values: Any) -> None:
        """Sends to a replica; one that does not take it is dropped."""
        try:
            protocol.send(replica.connection, kind, **values)
        except OSError as error:
            self.drop(replica, self._exit_words(replica) or f"took no message for {self._deadline_ms} ms ({error})")

    def poll(self, timeout_s: float, wake: int | None = None) -> list[tuple[Replica, protocol.Message | None]]:
        """What happened within the time: messages in order, and None for a replica that is no more alive.

        Returns early when something did, or when the file descriptor ``wake`` has something to read.
        """
        watched: list[Any] = [] if wake is None else [wake]
        for replica in self.alive:
            watched += [replica.connection, replica.process.sentinel]
        happened = set(wait(watched, timeout_s))
        events: list[tuple[Replica, protocol.Message | None]] = []
        for replica in self.alive:
            ended = replica.process.sentinel in happened
            if not ended and replica.connection not in happened:
                continue
            # Messages first: a replica may have answered before it died.
            gone = self._drain(replica, events, everything=ended)
            if gone or ended:
                words = self._exit_words(replica) if ended or gone == _CLOSED else gone
                self.drop(replica, words or gone)
                events.append((replica, None))
        return events

    def _drain(self, replica: Replica, events: list[tuple[Replica, protocol.Message | None]], everything: bool) -> str:
        """Takes the messages that are there; returns why no more can come, or ''."""
        try:
            while replica.connection.poll(0):
                events.append((replica, protocol.receive(replica.connection, protocol.FROM_REPLICA)))
                replica.heard = time.monotonic()
        except (EOFError, ConnectionError):  # reset: it ended with a message of ours unread
            return _CLOSED
        except (OSError, UsageError) as error:
            return f"sent nonsense or stopped in the middle of a message ({error})"
        return "it has ended" if everything else ""

    def _exit_words(self, replica: Replica) -> str:
        replica.process.join(_KILL_S)
        code = replica.process.exitcode
        if code is None:
            return ""
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (as the kernel does when memory runs out)" if code == -signal.SIGKILL else "")

    def drop(self, replica: Replica, words: str) -> None:
        """Takes a replica out: killed if it still runs. The group's memory stays with those that map it."""
        replica.alive = False
        replica.words = replica.words or words
        if replica.process.is_alive():
            replica.process.kill()
            replica.process.join(_KILL_S)
        replica.connection.close()

    def end(self, *, graceful: bool) -> None:
        """Ends every process within bounded time and removes the names of the group's shared memory. Idempotent."""
        try:
            if graceful:
                for replica in self.alive:
                    self.send(replica, "close")
                limit = time.monotonic() + self._close_s
                for replica in self.alive:
                    replica.process.join(max(0.0, limit - time.monotonic()))
        finally:
            for replica in self.alive:
                self.drop(replica, "" if replica.process.exitcode == 0 else "closed by the launcher")
            self._store = None
            _C.unlink_segments(self.token, self.world_size)


def _bound(connection: Connection, deadline_ms: int) -> None:
    """A peer that is stopped must not stop the launcher: the socket's own timeouts end a blocked read or write."""
    value = struct.pack("ll", deadline_ms // 1000, deadline_ms % 1000 * 1000)
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
