"""A replica that runs a vLLM engine, in this process: it must not outlive it, and the launcher hears of its death.

vLLM is imported by the fork server, and not by the launcher, which also imports this module.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .. import config as environment
from ..errors import UsageError
from ..integrations.vllm import engine_arguments
from ..integrations.vllm.settings import RankSettings
from ..loading import Checkpoint
from . import protocol
from .replica_process import Inbox, Rarely, run, send_result, starting


def run_vllm_replica(settings: dict[str, Any], connection: Connection) -> None:
    """Target of the process; see ``replica_process.run``."""
    run(_serve, settings, connection)


def _serve(settings: dict[str, Any], connection: Connection, inbox: Inbox) -> None:
    from ..integrations.vllm.engine import WorkerExtension, current

    environment.prepare_vllm()
    if gpus := settings["gpus"]:
        environment.put_own_gpu_first(settings["rank"] % gpus, gpus)
    with starting(connection, RankSettings().setup_ms / 1000):
        engine = _start(settings)
    held = current()
    protocol.send(connection, "ready", memory=held.memory(), load=held.load)
    work = Batches(engine, settings["eos_token_ids"])
    rarely = Rarely(1.0)
    while True:
        while (message := inbox.poll() if work.unfinished else inbox.get()) is not None:
            if message["type"] == "close":
                WorkerExtension().sidp_close()  # what is unfinished is dropped
                return
            if message["type"] == "stats":
                protocol.send(connection, "stats", stats=held.stats(), memory=held.memory())
            else:
                work.add(message["batch"], message["input_ids"], message["max_new_tokens"])
        for batch, sequences, reasons, num_steps, seconds in work.step():
            send_result(connection, held.runtime, batch, sequences, reasons, num_steps, seconds)
        if rarely() and work.unfinished:
            protocol.send(connection, "alive", batch=next(iter(work.unfinished)), steps=work.steps)


def _start(settings: dict[str, Any]) -> Any:
    from vllm import LLM

    from ..integrations.vllm.compat import set_num_threads

    set_num_threads(settings["threads"])
    return LLM(**llm_arguments(settings)).llm_engine


def llm_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``. Of the user's, ``JobConfig`` has refused what is set here for good."""
    pool = engine_arguments(
        rank=settings["rank"],
        store=f"{settings['store_host']}:{settings['store_port']}",
        own={"serve_store": False, "token": settings["token"], "deadline_ms": settings["deadline_ms"]},
        world_size=settings["world_size"],
        backend=settings["backend"],
        mode=settings["mode"],
        max_rows=settings["step_rows"][-1],
    )
    given = dict(settings["engine_arguments"])
    compilation = given.pop("compilation_config", {})
    if isinstance(compilation, int):
        compilation = {"mode": compilation}  # vLLM's short form
    compilation = {**pool.pop("compilation_config", {}), **compilation}
    return {
        "max_num_seqs": settings["step_rows"][-1],
        "enable_prefix_caching": False,  # a prompt's tokens must not depend on who was here before
        **({"compilation_config": compilation} if compilation else {}),
        **given,
        "model": Checkpoint.from_json(settings["checkpoint"]).root,
        "dtype": settings["dtype"],
        "seed": settings["seed"],
        "disable_log_stats": True,
        **pool,
    }


@dataclass
class _Batch:
    """A batch that the engine has: what its prompts got so far, and the engine's step before its first."""

    sequences: list[list[int]]
    reasons: list[str]
    first_step: int


class Batches:
    """The batches that an engine works on together; one can come at any step.

    ``engine``: a vLLM ``LLMEngine`` with nothing else to do. Greedy. ``unfinished``: by batch number; ``steps``: of the
    engine so far.
    """

    def __init__(self, engine: Any, eos_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._eos_token_ids = list(eos_token_ids)
        self._since = time.perf_counter()  # the last answer, or the first batch after a rest
        self.unfinished: dict[int, _Batch] = {}
        self.steps = 0

    def add(self, batch: int, input_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Gives the engine the prompts of one more batch."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=self._eos_token_ids, detokenize=False
        )
        if not self.unfinished:
            self._since = time.perf_counter()
        self.unfinished[batch] = _Batch([[] for _ in input_ids], [""] * len(input_ids), self.steps)
        for index, ids in enumerate(input_ids):
            self._engine.add_request(f"{batch}.{index}", {"prompt_token_ids": list(ids)}, params)

    def step(self) -> list[tuple[int, list[list[int]], list[str], int, float]]:
        """One step; the batches that it finished.

        Of each the new token ids of its prompts, end tokens included, why they ended, the steps, and the seconds since
        the answer before it: those of all batches add up to the time in which the engine worked.
        """
        outputs = self._engine.step()
        self.steps += 1
        finished = []
        for output in outputs:
            if not output.finished:
                continue
            number, index = map(int, output.request_id.split("."))
            batch, done = self.unfinished[number], output.outputs[0]
            if done.finish_reason not in ("stop", "length"):
                raise UsageError(f"vLLM ended a request with {done.finish_reason!r} instead of an answer")
            batch.sequences[index], batch.reasons[index] = list(done.token_ids), str(done.finish_reason)
            if all(batch.reasons):
                del self.unfinished[number]
                now = time.perf_counter()
                finished.append(
                    (number, batch.sequences, batch.reasons, self.steps - batch.first_step, now - self._since)
                )
                self._since = now
        return finished
