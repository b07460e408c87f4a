"""A process that pretends to be a replica of a job."""

from __future__ import annotations

import os
import signal
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sidp_runtime.errors import UnhelpfulWarning
from sidp_runtime.job import protocol, replica_process


def fake_replica(settings: dict[str, Any], connection: Connection) -> None:
    """Answers each prompt with its own tokens doubled. ``settings["fake"]`` says what to do otherwise.

    ``ready``: by rank, what to do before being ready (``die``, ``hang``, ``error NAME``, ``warn TEXT``),
    ``tries``: only so often. ``batch``: by "rank" or "rank:batch", what to do with a batch (``die``, ``hang``,
    ``stop``, ``error``, ``lie``, ``nonsense``, ``half``, ``slow``). ``stats``, ``close``: by rank (``die``, ``hang``).
    """
    fake, rank = settings["fake"], str(settings["rank"])

    def act(what: str) -> None:
        kind, _, name = what.partition(" ")
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "exit":
            os._exit(int(name))
        elif kind == "hang":
            time.sleep(600)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "error":
            protocol.send(connection, "error", error=name, message="the words of the replica")
            os._exit(1)
        elif kind == "warn":
            replica_process._send_warnings(connection)
            warnings.warn(name, UnhelpfulWarning, stacklevel=1)
        elif kind == "nonsense":
            connection.send_bytes(b"\x00not json")
        elif kind == "half":
            os.write(connection.fileno(), b"\x00\x00\x01\x00partial")
            time.sleep(600)

    log = Path(settings["log"])
    with log.open("a") as stream:
        stream.write(f"{rank} {os.getpid()} {settings['token']}\n")
    attempt = len({line.split()[2] for line in log.read_text().splitlines()})
    if attempt <= fake.get("tries", 99):
        act(fake.get("ready", {}).get(rank, ""))
    protocol.send(connection, "loading", done=5, total=10)
    protocol.send(connection, "ready", memory={"pooled_bytes": 1}, load={"bytes_read": 7})
    while True:
        try:
            message = protocol.receive(connection, protocol.FROM_LAUNCHER)
        except (EOFError, OSError):
            os._exit(3)
        if message["type"] == "close":
            act(fake.get("close", {}).get(rank, ""))
            return
        if message["type"] == "stats":
            act(fake.get("stats", {}).get(rank, ""))
            protocol.send(connection, "stats", stats={"steps": {"was": 1}}, memory={"pooled_bytes": 2})
            continue
        index = message["batch"]
        what = fake.get("batch", {}).get(f"{rank}:{index}", fake.get("batch", {}).get(rank, ""))
        act(what)
        if what == "slow":
            for steps in range(5 if index else 30):
                time.sleep(0.1)
                protocol.send(connection, "alive", batch=index, steps=steps)
        sequences = [[2 * token for token in ids] for ids in message["input_ids"]]
        protocol.send(
            connection,
            "result",
            batch=index + (what == "lie"),
            sequences=sequences,
            finish=["length"] * len(sequences),
            num_steps=2,
            seconds=0.01,
        )
