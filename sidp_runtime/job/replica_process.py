"""A replica's process: its talk with the launcher, whatever engine it runs.

Importing must start no thread of ours: the fork server forks after it.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ..errors import SidpError, UnhelpfulWarning
from . import protocol

if TYPE_CHECKING:
    from ..runtime import Runtime

LAUNCHER_GONE = 3  # exit code


class Inbox:
    """The launcher's messages, read by a thread of their own, the replica's lifeline.

    It ends the process at once when the launcher is gone, whatever the main thread is doing: nothing is orphaned.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[protocol.Message] = queue.SimpleQueue()
        self.closing = threading.Event()
        threading.Thread(target=self._read, name="lifeline", daemon=True).start()

    def get(self) -> protocol.Message:
        """The next message; blocks."""
        return self._messages.get()

    def poll(self) -> protocol.Message | None:
        """The next message, or None if there is none yet."""
        try:
            return self._messages.get_nowait()
        except queue.Empty:
            return None

    def _read(self) -> None:
        while True:
            try:
                message = protocol.receive(self._connection, protocol.FROM_LAUNCHER)
            except (EOFError, OSError, SidpError):
                os._exit(LAUNCHER_GONE)
            if message["type"] == "close":
                self.closing.set()
            self._messages.put(message)


class Rarely:
    """True at most once in ``interval`` seconds."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < self._interval:
            return False
        self._last = now
        return True


@contextmanager
def starting(connection: Connection, limit_s: float, interval_s: float = 5.0) -> Iterator[None]:
    """Says every ``interval_s`` that the replica is being set up, where what is called gives no sign itself.

    For ``limit_s`` at most: a set-up that hangs must show. Nothing else may be sent inside.
    """
    stop = threading.Event()
    limit = time.monotonic() + limit_s

    def speak() -> None:
        while not stop.wait(interval_s) and time.monotonic() < limit:
            try:
                protocol.send(connection, "starting")
            except OSError:
                return  # the lifeline ends the process

    thread = threading.Thread(target=speak, name="starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


Serve = Callable[[dict[str, Any], Connection, Inbox], None]


def run(serve: Serve, settings: dict[str, Any], connection: Connection) -> None:
    """Runs ``serve`` as the process's work. ``settings``: plain data, made by ``runner.run`` and ``ReplicaSet``.

    Exit codes: 0 closed, 1 an error that was reported, 3 launcher gone.
    """
    # Ctrl-C reaches the whole foreground group; the launcher decides what becomes of its replicas.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox = Inbox(connection)
    _send_warnings(connection)
    try:
        serve(settings, connection, inbox)
    except Exception as error:  # whatever it is, the launcher must hear it
        try:
            protocol.send(connection, "error", error=type(error).__name__, message=str(error))
        except OSError:
            os._exit(LAUNCHER_GONE)
        sys.exit(1)


def _send_warnings(connection: Connection) -> None:
    """Our own warnings, which the main thread gives while it sets up, go to the launcher and not to stderr."""
    show = warnings.showwarning

    def showwarning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, UnhelpfulWarning):
            protocol.send(connection, "warning", text=str(message))
        else:
            show(message, category, *where, **options)

    warnings.showwarning = showwarning


def step_callback(batch: int, connection: Connection, inbox: Inbox) -> Callable[[int], bool]:
    """What to call after each step with the number of steps; True: break off."""
    rarely = Rarely(1.0)

    def on_step(steps: int) -> bool:
        # From the thread that computes: it says that steps are made, not merely that the process lives.
        if rarely():
            protocol.send(connection, "alive", batch=batch, steps=steps)
        return inbox.closing.is_set()

    return on_step


def send_result(
    connection: Connection,
    runtime: Runtime,
    batch: int,
    sequences: list[list[int]],
    finish: list[str],
    num_steps: int,
    seconds: float,
) -> None:
    """Sends a batch's answers, once it is certain that they are some. ``seconds``: of work, no other batch's in it."""
    runtime.check()  # on a GPU an unanswered request shows only here
    protocol.send(
        connection,
        "result",
        batch=batch,
        sequences=sequences,
        finish=finish,
        num_steps=num_steps,
        seconds=seconds,
    )
