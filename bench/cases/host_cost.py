"""Host time, and instructions, of each call of a step. On a GPU calls only enqueue; nothing is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from sidp_runtime import Mode

from ..harness import Bar
from ..instructions import count_instructions
from ..layers import OP, Replica, open_replica
from ..rank import RankContext, Samples

STEPS = 5  # of a sample on a GPU: few enough for the queues


def run(context: RankContext) -> None:
    with open_replica(context, buckets=(1,)) as replica:
        replica.verify()
        calls = _calls(context, replica)
        samples = Samples()
        for _ in range(context.repeats):
            for name, (call, units) in calls.items():
                context.meet()
                call()
                context.synchronize()
                start = time.perf_counter()
                counted = [call() for _ in range(STEPS)]
                whole = time.perf_counter() - start
                mine = (sum(counted) if isinstance(counted[0], float) else whole) / STEPS / units
                context.synchronize()
                samples.seconds.setdefault(name, []).append(context.gather(mine)[0])
        bars = {"sidp_fetch_release": Bar(5.0, at_least=False, gpus=1)} if context.on_gpu else {}
        context.record(samples, "host_time", "us", lambda s: s * 1e6, higher_is_better=False, bars=bars)
        for name, (call, units) in calls.items():
            context.meet()
            count, why = count_instructions(lambda call=call: [call() for _ in range(STEPS)])  # type: ignore[misc]
            context.synchronize()
            if context.rank == 0 and count is None:
                context.figure("instructions", name, "instructions", status="unavailable", reason=why)
            elif context.rank == 0 and count is not None:
                context.figure("instructions", name, "instructions", samples=(count / STEPS / units,),
                               higher_is_better=False)  # fmt: skip


def _calls(context: RankContext, replica: Replica) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: a call, and how many of what is counted it makes. A call may give the seconds that count."""
    runtime, streamed, local = replica.runtime, replica.streamed, replica.pool.local_layers
    stream = torch.cuda.current_stream().cuda_stream if context.on_gpu else None
    x = replica.rows(1)

    def step() -> None:
        with replica.step(1, Mode.CAS):
            pass

    def fetch_local() -> None:
        with replica.step(1, Mode.CAS):
            for i in local:
                runtime.fetch_layer(i, stream=stream)
                runtime.release_layer(i, stream=stream)

    def fetch_all() -> None:
        current = torch.cuda.current_stream().cuda_stream  # another one in a capture
        for i in streamed:
            runtime.fetch_layer(i, stream=current)
            runtime.release_layer(i, stream=current)

    def fetch() -> float:
        with replica.step(1, Mode.WAS):
            start = time.perf_counter()
            fetch_all()
            return time.perf_counter() - start

    def ask() -> float:
        waited = runtime.stats()["reply_wait_ns"]  # for answers, so as not to run too far ahead
        with replica.step(1, Mode.CAS):
            start = time.perf_counter()
            for i in streamed:
                runtime.remote_compute(i, OP, x, stream=stream)
            seconds = time.perf_counter() - start
        return float(seconds - (runtime.stats()["reply_wait_ns"] - waited) / 1e9)

    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "sidp_empty_step": (step, 1),
        "sidp_fetch_release_local": (fetch_local, len(local)),
    }
    if context.on_gpu:  # on the host these calls do the work itself
        calls["sidp_fetch_release"] = (fetch, len(streamed))
        calls["sidp_remote_compute"] = (ask, len(streamed))
        calls["sidp_replay_step"] = (replica.captured_by(1, Mode.WAS, fetch_all), 1)
    return calls
