"""A replica: one process, one rank. Imported by the fork server, so torch and transformers are imported once.

Importing must start no thread of ours: the fork server forks after it.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .. import _torch
from ..errors import SidpError
from ..group import Group
from ..integrations import generation
from ..integrations import transformers as sidp_hf
from ..loading import Checkpoint
from . import protocol

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

    def _read(self) -> None:
        while True:
            try:
                message = protocol.receive(self._connection, protocol.FROM_LAUNCHER)
            except (EOFError, OSError, SidpError):
                os._exit(LAUNCHER_GONE)
            if message["type"] == "close":
                self.closing.set()
            self._messages.put(message)


class _Rarely:
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


def run_replica(settings: dict[str, Any], connection: Connection) -> None:
    """Target of the process. ``settings``: plain data, made by ``runner.run`` and ``ReplicaSet``.

    Exit codes: 0 closed, 1 an error that was reported, 3 launcher gone.
    """
    # Ctrl-C reaches the whole foreground group; the launcher decides what becomes of its replicas.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox = Inbox(connection)
    try:
        _serve(settings, connection, inbox)
    except Exception as error:  # whatever it is, the launcher must hear it
        try:
            protocol.send(connection, "error", error=type(error).__name__, message=str(error))
        except OSError:
            os._exit(LAUNCHER_GONE)
        sys.exit(1)


def _serve(settings: dict[str, Any], connection: Connection, inbox: Inbox) -> None:
    generation.prepare(settings["threads"], settings["seed"])
    model = _load(settings, connection)
    protocol.send(connection, "ready", memory=model.memory_report(), load=vars(model.load_report))
    while True:
        message = inbox.get()
        if message["type"] == "close":
            model.close()
            return
        if message["type"] == "stats":
            protocol.send(connection, "stats", stats=model.stats(), memory=model.memory_report())
        else:
            _generate(model, settings, message, connection, inbox)


def _load(settings: dict[str, Any], connection: Connection) -> sidp_hf.PooledModel:
    store = _torch.connect_store(settings["store_host"], settings["store_port"], settings["deadline_ms"])
    group = Group(
        settings["rank"],
        settings["world_size"],
        store,
        backend=settings["backend"],
        token=settings["token"],
        deadline_ms=settings["deadline_ms"],
        device=_device(settings),
    )
    rarely = _Rarely(0.25)

    def progress(done: int, total: int, bytes_per_s: float) -> None:
        if rarely() or done == total:
            protocol.send(connection, "loading", done=done, total=total)

    return sidp_hf.load_pooled_model(
        Checkpoint.from_json(settings["checkpoint"]),
        group=group,
        dtype=settings["dtype"],
        mode=settings["mode"],
        max_rows=settings["step_rows"][-1],
        row_buckets=None if group.device is None else settings["step_rows"],
        progress=progress,
    )


def _device(settings: dict[str, Any]) -> int | None:
    if settings["backend"] == "host":
        return None
    from .. import _torch_gpu

    return _torch_gpu.device_of(settings["rank"])


def _generate(
    model: sidp_hf.PooledModel,
    settings: dict[str, Any],
    message: protocol.Message,
    connection: Connection,
    inbox: Inbox,
) -> None:
    start = time.perf_counter()
    sequences, finish = generation.generate_batch(
        model.model,
        message["input_ids"],
        message["max_new_tokens"],
        settings["pad_token_id"],
        settings["eos_token_ids"],
        _step_callback(message["batch"], connection, inbox),
    )
    if inbox.closing.is_set():
        return  # broken off: not a result
    model.runtime.check()  # on a GPU an unanswered request shows only here
    protocol.send(
        connection,
        "result",
        batch=message["batch"],
        sequences=sequences,
        finish=finish,
        num_steps=max(len(sequence) for sequence in sequences),
        seconds=time.perf_counter() - start,
    )


def _step_callback(batch: int, connection: Connection, inbox: Inbox) -> Callable[[int], bool]:
    rarely = _Rarely(1.0)

    def on_step(steps: int) -> bool:
        # From the thread that computes: it says that steps are made, not merely that the process lives.
        if rarely():
            protocol.send(connection, "alive", batch=batch, steps=steps)
        return inbox.closing.is_set()

    return on_step
