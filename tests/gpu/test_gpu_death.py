"""A rank that dies or hangs in mid-step: survivors finish the step within the deadline, with right results."""

from __future__ import annotations

import random
import signal
import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, Ranks
from helpers.ranks import open_replica

MODEL = SyntheticModel(num_layers=6, hidden=64, uneven=False)


def step_until_struck(context: RankContext, mode: str) -> dict[str, Any]:
    with open_replica(
        context, MODEL, mode=mode, backend="nvshmem", max_rows=4, meet_at_end=False, runtime_deadline_ms=3000
    ) as replica:
        replica.step(rows=1)
        context.meet("ready")
        if context.rank == 0:
            context.mark("started")
        seed, left, slowest = 0, 6, 0.0
        while left:
            left -= context.marked("struck")
            start = time.monotonic()
            assert replica.step(rows=1 + seed % 4, seed=seed) == mode
            torch.cuda.synchronize()
            slowest = max(slowest, time.monotonic() - start)
            seed += 1
        stats = replica.runtime.stats()
        return {"slowest": slowest, "steps": stats["steps"][mode], "fallbacks": stats["fallbacks"]}


@pytest.mark.parametrize("mode", ["was", "cas"])
@pytest.mark.parametrize("seed", range(10))
def test_survivors_of_a_kill_finish_with_right_results(seed: int, mode: str) -> None:
    moment = random.Random(seed)
    victim, delay_s = moment.randrange(2), moment.uniform(0, 0.05)
    with Ranks(step_until_struck, 2, timeout_s=90, mode=mode) as ranks:
        ranks.wait_for("started", 60)
        time.sleep(delay_s)
        ranks.signal(victim, signal.SIGKILL)
        ranks.mark("struck")
        outcomes = ranks.join()
        assert outcomes[victim].exit_code == -signal.SIGKILL
        ranks.check([outcome for outcome in outcomes if outcome.rank != victim])
    value = outcomes[1 - victim].value
    assert value["slowest"] < 3
    assert value["steps"] >= 6
    assert (value["fallbacks"] >= 5 * 3) == (mode == "cas")


def beside_a_stopped_owner(context: RankContext) -> dict[str, Any]:
    with open_replica(
        context, MODEL, mode="cas", backend="nvshmem", max_rows=4, meet_at_end=False, runtime_deadline_ms=700
    ) as replica:
        replica.step(rows=1)
        context.meet("ready")
        if context.rank == 0:
            context.mark("started")
            context.wait_for("resumed")
            context.wait_for("survived")
            replica.step(rows=2)
            context.meet("end")
            return {}
        context.wait_for("stopped")
        times = []
        for seed in range(4):
            start = time.monotonic()
            replica.step(rows=2, seed=seed)
            torch.cuda.synchronize()
            times.append(time.monotonic() - start)
        context.mark("survived")
        context.wait_for("resumed")
        replica.step(rows=2, seed=7)
        context.meet("end")
        return {"times": times, "fallbacks": replica.runtime.stats()["fallbacks"]}


def test_a_stopped_owner_costs_one_deadline_and_is_not_waited_for_again() -> None:
    with Ranks(beside_a_stopped_owner, 2, timeout_s=90) as ranks:
        ranks.wait_for("started", 60)
        ranks.signal(0, signal.SIGSTOP)
        ranks.mark("stopped")
        ranks.wait_for("survived")
        ranks.signal(0, signal.SIGCONT)
        ranks.mark("resumed")
        outcomes = ranks.join(stop_on_failure=True)
        ranks.check(outcomes)
    first, *later = outcomes[1].value["times"]
    assert 0.7 <= first < 3
    assert max(later) < 0.6
    assert outcomes[1].value["fallbacks"] >= 4 * 3
