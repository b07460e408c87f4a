"""A replica that runs a vLLM engine, in this process: it must not outlive it, and the launcher hears of its death.

vLLM is imported by the fork server, and not by the launcher, which also imports this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from .. import config as environment
from ..errors import UsageError
from ..integrations.vllm import engine_arguments
from ..loading import Checkpoint
from . import protocol
from .replica_process import Inbox, run, send_result, step_callback


def run_vllm_replica(settings: dict[str, Any], connection: Connection) -> None:
    """Target of the process; see ``replica_process.run``."""
    run(_serve, settings, connection)


def _serve(settings: dict[str, Any], connection: Connection, inbox: Inbox) -> None:
    from ..integrations.vllm.engine import WorkerExtension, current

    environment.prepare_vllm()
    if gpus := settings["gpus"]:
        environment.put_own_gpu_first(settings["rank"] % gpus, gpus)
    engine = _start(settings)
    held = current()
    protocol.send(connection, "ready", memory=held.memory(), load=held.load)
    while True:
        message = inbox.get()
        if message["type"] == "close":
            WorkerExtension().sidp_close()
            return
        if message["type"] == "stats":
            protocol.send(connection, "stats", stats=held.stats(), memory=held.memory())
            continue
        start = time.perf_counter()
        answer = generate(
            engine,
            message["input_ids"],
            message["max_new_tokens"],
            settings["eos_token_ids"],
            step_callback(message["batch"], connection, inbox),
        )
        if answer is None:
            continue  # broken off: not a result
        send_result(connection, held.runtime, message["batch"], *answer, start)


def _start(settings: dict[str, Any]) -> Any:
    from vllm import LLM

    from ..integrations.vllm.compat import set_num_threads

    set_num_threads(settings["threads"])
    checkpoint = Checkpoint.from_json(settings["checkpoint"])
    given = {
        "max_num_seqs": settings["step_rows"][-1],
        "enable_prefix_caching": False,  # a prompt's tokens must not depend on who was here before
        **settings["engine_arguments"],
    }
    llm = LLM(
        model=checkpoint.root,
        dtype=settings["dtype"],
        seed=settings["seed"],
        disable_log_stats=True,
        **given,
        **engine_arguments(
            rank=settings["rank"],
            store=f"{settings['store_host']}:{settings['store_port']}",
            own={"serve_store": False, "token": settings["token"], "deadline_ms": settings["deadline_ms"]},
            world_size=settings["world_size"],
            backend=settings["backend"],
            mode=settings["mode"],
            max_rows=settings["step_rows"][-1],
        ),
    )
    return llm.llm_engine


def generate(
    engine: Any,
    input_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    on_step: Callable[[int], bool],
) -> tuple[list[list[int]], list[str], int] | None:
    """New token ids of each prompt, its end token included, why it ended, and the steps; None if it was broken off.

    ``engine``: a vLLM ``LLMEngine`` with nothing else to do. Greedy. ``on_step(n)``: after the n-th step; True breaks
    off.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=list(eos_token_ids), detokenize=False
    )
    for index, ids in enumerate(input_ids):
        engine.add_request(str(index), {"prompt_token_ids": list(ids)}, params)
    sequences: list[list[int]] = [[] for _ in input_ids]
    reasons = [""] * len(sequences)
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done = output.outputs[0]
                sequences[int(output.request_id)] = list(done.token_ids)
                reasons[int(output.request_id)] = str(done.finish_reason)
        steps += 1
        if on_step(steps):
            return None
    if odd := sorted(set(reasons) - {"stop", "length"}):
        raise UsageError(f"vLLM ended requests with {', '.join(map(repr, odd))} instead of an answer")
    return sequences, reasons, steps
