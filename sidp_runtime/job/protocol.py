"""Messages between launcher and replicas: JSON objects with a ``type``, never pickles.

| from replica | keys |
| --- | --- |
| ``starting`` | none: while an engine is set up that does not say how far it is |
| ``loading`` | ``done``, ``total``: bytes |
| ``warning`` | ``text``: for the user, before it is ready |
| ``ready`` | ``memory``: bytes by name, ``load``: bytes and seconds |
| ``alive`` | ``batch``, ``steps``: at most once a second while it generates |
| ``result`` | ``batch``, ``sequences`` (new token ids), ``finish`` (reasons), ``num_steps``, ``seconds`` |
| ``stats`` | ``stats``: counters of the runtime, ``memory`` |
| ``error`` | ``error``: class name, ``message``; the replica ends after it |

| from launcher | keys |
| --- | --- |
| ``batch`` | ``batch``, ``input_ids``, ``max_new_tokens`` |
| ``stats`` | |
| ``close`` | what is being generated is dropped |
"""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

from ..errors import UsageError

Message = dict[str, Any]

#: By type, the keys that a replica's message has.
FROM_REPLICA: dict[str, frozenset[str]] = {
    "starting": frozenset(),
    "loading": frozenset({"done", "total"}),
    "warning": frozenset({"text"}),
    "ready": frozenset({"memory", "load"}),
    "alive": frozenset({"batch", "steps"}),
    "result": frozenset({"batch", "sequences", "finish", "num_steps", "seconds"}),
    "stats": frozenset({"stats", "memory"}),
    "error": frozenset({"error", "message"}),
}
FROM_LAUNCHER: dict[str, frozenset[str]] = {
    "batch": frozenset({"batch", "input_ids", "max_new_tokens"}),
    "stats": frozenset(),
    "close": frozenset(),
}


def send(connection: Connection, kind: str, **values: Any) -> None:
    """Sends one message. ``OSError`` if the other side is gone or takes nothing."""
    connection.send_bytes(json.dumps({"type": kind, **values}, separators=(",", ":")).encode())


def receive(connection: Connection, known: dict[str, frozenset[str]]) -> Message:
    """Takes one message. ``EOFError`` or ``OSError`` if the other side is gone, ``UsageError`` if it is malformed."""
    data = connection.recv_bytes()
    try:
        message = json.loads(data)
        wanted = known[message["type"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"a message of {len(data)} bytes is not of this protocol: {data[:60]!r}") from error
    if missing := wanted - set(message):
        raise UsageError(f"a message {message['type']!r} lacks {', '.join(sorted(missing))}")
    return dict(message)
