"""Replicas stay independent: whatever one does or does not do, another's steps go on."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import open_replica


def busy_beside_idle(context: RankContext, mode: str, peer: str) -> dict[str, Any]:
    """Rank 0 makes 50 steps; the others do something else until it says that it is done."""
    with open_replica(context, mode=mode, meet_at_end=False, deadline_ms=60_000) as replica:
        if context.rank == 0:
            if peer != "idles":
                for other in range(1, context.world_size):
                    context.wait_for(f"ready-{other}")
            start = time.monotonic()
            for seed in range(50):
                replica.step(rows=1 + seed % 3, seed=seed)
            seconds = time.monotonic() - start
            context.mark("done")
            return {"seconds": seconds, "fallbacks": replica.runtime.stats()["fallbacks"]}
        if peer == "finishes":
            replica.step()
        if peer.startswith("closes"):
            replica.runtime.close()
        if peer == "closes":
            replica.pool.close()
            replica.group.close()
        context.mark(f"ready-{context.rank}")
        context.wait_for("done")
        return {"served": replica.runtime.stats()["served_by_peer"][0]}


@pytest.mark.parametrize("peer", ["idles", "finishes", "closes its runtime", "closes"])
@pytest.mark.parametrize("mode", ["was", "cas"])
def test_a_busy_rank_waits_for_nobody(mode: str, peer: str) -> None:
    busy, *others = run_ranks(busy_beside_idle, 3, mode=mode, peer=peer)
    assert busy["seconds"] < 40  # below the deadline of a minute: what has left is not waited for
    streamed = 3  # of 5 layers
    if mode == "was":
        assert busy["fallbacks"] == 0
    elif peer.startswith("closes"):
        assert busy["fallbacks"] == 50 * streamed
    else:
        assert busy["fallbacks"] == 0
        assert sum(other["served"] for other in others) == 50 * streamed


def unequal(context: RankContext) -> list[str]:
    modes = ("was", "cas", "auto")
    with open_replica(context, mode=modes[context.rank]) as replica:
        return [replica.step(rows=1 + seed % 5, seed=seed) for seed in range(5 + 20 * context.rank)]


def test_ranks_make_unequal_numbers_of_steps_in_unequal_modes() -> None:
    was, cas, _ = run_ranks(unequal, 3)
    assert set(was) == {"was"}
    assert set(cas) == {"cas"}


def all_at_once(context: RankContext) -> int:
    with open_replica(context, SyntheticModel(num_layers=8), mode="cas") as replica:
        context.meet("ready")
        for seed in range(25):
            replica.step(rows=1 + (seed + context.rank) % 4, seed=seed)
        return int(replica.runtime.stats()["fallbacks"])


def test_all_ranks_ask_all_others_at_once() -> None:
    assert run_ranks(all_at_once, 4, timeout_s=30) == [0] * 4


def serve_without_the_gil(context: RankContext, how: str) -> dict[str, float]:
    """Rank 0 never lets go of its GIL while rank 1 asks it for results."""
    with open_replica(context, mode="cas") as replica:
        context.meet("ready")
        if context.rank == 1:
            context.wait_for("holding")
            begun = time.monotonic()
            for seed in range(10):
                replica.step(seed=seed)
            return {"begun": begun, "ended": time.monotonic()}
        sys.setswitchinterval(1000)
        context.mark("holding")
        begun = time.monotonic()
        if how == "c":
            ctypes.PyDLL(None).usleep(2_000_000)
        else:
            while time.monotonic() - begun < 2.0:
                pass
        ended = time.monotonic()
        sys.setswitchinterval(0.005)
        return {"begun": begun, "ended": ended}


@pytest.mark.parametrize("how", ["c", "python"])
def test_requests_are_served_while_the_owner_holds_its_gil(how: str) -> None:
    owner, requester = run_ranks(serve_without_the_gil, 2, how=how)
    assert owner["begun"] - 0.1 < requester["begun"]
    assert requester["ended"] < owner["ended"], "the requests were answered only once the GIL was free"


def waits_without_the_gil(context: RankContext) -> int:
    """While a fetch waits for its layer, the rank's other Python threads run."""
    import threading

    with open_replica(context, mode="was", ops=(), test_lane_delay_us=50_000) as replica:
        turns, stop = [0], threading.Event()

        def count() -> None:
            while not stop.is_set():
                turns[0] += 1
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        replica.step()
        stop.set()
        thread.join()
        return turns[0]


def test_a_wait_lets_other_python_threads_run() -> None:
    assert min(run_ranks(waits_without_the_gil, 2)) > 20


def memory(context: RankContext) -> dict[str, Any]:
    model = SyntheticModel(num_layers=6, hidden=256, inner=512, uneven=False)
    with open_replica(context, model, mode="was", ops=(), resident_layers=[5]) as replica:
        replica.step()
        context.meet("touched")
        report = replica.pool.memory_report()
        context.meet("measured")
        placement = replica.pool.placement
        return {
            "report": report,
            "pooled": replica.pool.pooled_bytes - placement.resident_bytes,
            "share": placement.pool_bytes(context.rank),
            "ring": placement.ring_bytes(context.rank),
            "resident": placement.resident_bytes,
            "layer": model.layers()[0].num_bytes,
            "held": replica.pool.held_bytes,
        }


def test_the_group_holds_one_copy_of_the_pooled_layers() -> None:
    ranks = run_ranks(memory, 3)
    page = 4096
    pooled = ranks[0]["pooled"]
    assert abs(sum(rank["report"]["pool_pss"] for rank in ranks) - pooled) <= 3 * 3 * page
    for rank in ranks:
        report = rank["report"]
        assert report["own_pool_rss"] <= rank["share"] + page
        assert report["own_pool_rss"] <= pooled / 3 + rank["layer"]
        assert 0 <= report["ring_rss"] - rank["ring"] < page
        assert 0 <= report["resident_rss"] - rank["resident"] < page
        assert report["pool_rss"] >= pooled
        assert report["rss"] > report["pss"] > 0
        assert rank["held"] == rank["share"] + rank["ring"] + rank["resident"]


def threads_of(context: RankContext) -> list[list[str]]:
    from pathlib import Path

    def names() -> list[str]:
        tasks = Path("/proc/self/task").iterdir()
        return sorted(name for t in tasks if (name := (t / "comm").read_text().strip()).startswith("sidp"))

    with open_replica(context) as replica:
        replica.step()
        end = time.monotonic() + 10
        while len(running := names()) < 2 and time.monotonic() < end:  # a thread names itself, once it is let run
            time.sleep(0.001)
        context.meet("looked")
    return [running, names()]


def test_a_runtime_has_two_threads_and_close_ends_them() -> None:
    assert run_ranks(threads_of, 2) == [[["sidp-lane", "sidp-service"], []]] * 2


def threads_of_torch(context: RankContext, threads: int) -> int:
    """Torch splits some sums by its thread count, so owner and requester must run with the same."""
    torch.set_num_threads(threads)
    model = SyntheticModel(num_layers=2, hidden=256, inner=512, uneven=False)
    with open_replica(context, model, mode="cas") as replica:
        for rows in range(1, 13):
            replica.step(rows=rows, seed=rows)
        return int(replica.runtime.stats()["fallbacks"])


@pytest.mark.parametrize("threads", [1, 2])
def test_owner_and_requester_use_as_many_torch_threads(threads: int) -> None:
    assert run_ranks(threads_of_torch, 2, threads=threads) == [0, 0]
