"""The guard itself: what hangs is killed and reported within its bound, what dies is reported with its exit code."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from helpers.processes import RankContext, RankFailureError, Ranks, run_ranks


def echo(context: RankContext, word: str) -> list[Any]:
    print("said", word, flush=True)
    return [context.rank, context.world_size, word]


def hang(context: RankContext) -> None:
    if context.rank == 1:
        print("rank 1 sleeps", flush=True)
        time.sleep(600)


def die(context: RankContext, how: str) -> None:
    if context.rank == 0:
        time.sleep(600)
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such word")


def leave_a_name(context: RankContext) -> None:
    descriptor = os.open(f"/dev/shm/sidp-{context.token}-0-pool", os.O_CREAT)
    os.close(descriptor)


def test_results_come_back_by_rank() -> None:
    per_rank = [{"word": "a"}, {"word": "b"}]
    assert run_ranks(echo, 2, per_rank=per_rank) == [[0, 2, "a"], [1, 2, "b"]]


def test_a_hung_rank_is_killed_and_reported_with_its_output_and_stack() -> None:
    start = time.monotonic()
    with Ranks(hang, 2, timeout_s=1.0) as ranks:
        pids = [ranks.pid(index) for index in range(2)]
        outcomes = ranks.join()
        with pytest.raises(RankFailureError, match=r"(?s)rank 1: did not finish in time.*rank 1 sleeps.*in hang"):
            ranks.check(outcomes)
    assert time.monotonic() - start < 15
    assert [outcome.overdue for outcome in outcomes] == [False, True]
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("how", "words"),
    [("exit", "exit code 7"), ("kill", "exit code -9"), ("raise", "raised ValueError: no such word")],
)
def test_a_dead_rank_is_reported_and_the_others_are_not_waited_for(how: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailureError, match=rf"process 1, rank 1: .*{words}"):
        run_ranks(die, 2, how=how, timeout_s=30)
    assert time.monotonic() - start < 15


def test_a_name_left_in_shared_memory_is_a_failure_and_is_removed() -> None:
    with Ranks(leave_a_name, 1) as ranks:
        outcomes = ranks.join()
        with pytest.raises(RankFailureError, match=r"left in /dev/shm: .'sidp-[0-9a-f]{32}-0-pool'"):
            ranks.check(outcomes)
    assert ranks.left_behind() == []
    assert not ranks.folder.exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
