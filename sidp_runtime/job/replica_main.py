"""A replica that runs a transformers model. Imported by the fork server, so torch and transformers are imported once.

Importing must start no thread of ours: the fork server forks after it.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

from .. import _torch
from ..group import Group
from ..integrations import generation
from ..integrations import transformers as sidp_hf
from ..loading import Checkpoint
from . import protocol
from .replica_process import Inbox, Rarely, run, send_result, step_callback


def run_replica(settings: dict[str, Any], connection: Connection) -> None:
    """Target of the process; see ``replica_process.run``."""
    run(_serve, settings, connection)


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
        device=settings["rank"] % settings["gpus"] if settings["gpus"] else None,
    )
    rarely = Rarely(0.25)

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
        step_callback(message["batch"], connection, inbox),
    )
    if inbox.closing.is_set():
        return  # broken off: not a result
    num_steps = max(len(sequence) for sequence in sequences)
    seconds = time.perf_counter() - start
    send_result(connection, model.runtime, message["batch"], sequences, finish, num_steps, seconds)
