"""Steps in captured CUDA graphs: right bytes after many replays, in changing modes, with copies outside the graph."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel, mlp
from helpers.processes import RankContext, run_ranks
from helpers.ranks import Replica, open_replica

from sidp_runtime import Mode
from sidp_runtime._C import StepKind
from sidp_runtime.errors import UsageError
from sidp_runtime.runtime import Step

MODEL = SyntheticModel(num_layers=6, hidden=64)
ROWS = 4


def forward(replica: Replica, x: torch.Tensor, mode: Mode) -> torch.Tensor:
    for layer in range(replica.model.num_layers):
        if replica.pool.is_local(layer) or mode == Mode.WAS:
            x = mlp(replica.fetch(layer), x)
            replica.runtime.release_layer(layer)
        else:
            result = replica.runtime.remote_compute(layer, "mlp", x, borrow=layer % 4 < 2)
            assert isinstance(result, torch.Tensor)
            x = result
    return x


def expected(replica: Replica, x: torch.Tensor) -> torch.Tensor:
    for weights in replica.reference:
        x = mlp(weights, x)
    return x


def capture(replica: Replica, x: torch.Tensor, mode: Mode) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    expected(replica, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), replica.runtime.capture_step(ROWS, mode):
        y = forward(replica, x, mode)
    return graph, y


def replay_and_switch(context: RankContext, replays: int) -> dict[str, Any]:
    with open_replica(context, MODEL, backend="nvshmem", max_rows=ROWS, mode="auto") as replica:
        x = replica.rows(ROWS)
        graphs = {mode: capture(replica, x, mode) for mode in (Mode.WAS, Mode.CAS)}
        torch.cuda.synchronize()
        before = replica.runtime.stats()
        assert before["steps"] == {"was": 0, "cas": 0}, "a capture is no step"
        assert before["fetches"] == 0
        counts = {"was": 0, "cas": 0}
        for number in range(replays):
            x.copy_(replica.rows(ROWS, number % 50))
            # the policy would take one mode only; the order of modes is this rank's own
            mode = Mode.WAS if (number + context.rank) % 3 else Mode.CAS
            counts[mode.name.lower()] += 1
            graph, y = graphs[mode]
            with Step(replica.runtime, ROWS, torch.cuda.current_stream().cuda_stream, StepKind.REPLAY, mode) as step:
                step.replay(graph)
                if number % 7 == 0:
                    torch.cuda.synchronize()  # an engine may wait inside the step
            if number % 20 == 0:
                assert torch.equal(y, expected(replica, x)), f"replay {number} in {mode}"
        torch.cuda.synchronize()
        stats = replica.settled_stats(counts["was"] * len(replica.streamed) + len(replica.head()))
        assert stats["steps"] == counts
        assert stats["fetches"] == counts["was"] * len(replica.streamed)
        assert sum(stats["requests_by_peer"]) == counts["cas"] * len(replica.streamed)
        assert stats["fallbacks"] == 0
        replica.step(seed=3)  # and eager steps still find everything in order
        context.meet("all replayed")
        return counts


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_thousand_replays_with_switching_modes(world_size: int) -> None:
    run_ranks(replay_and_switch, world_size, replays=1000 if world_size == 2 else 100)


def launch_ahead(context: RankContext) -> None:
    with open_replica(context, MODEL, backend="nvshmem", max_rows=ROWS, mode="cas") as replica:
        x = replica.rows(ROWS)
        graph, y = capture(replica, x, Mode.CAS)
        torch.cuda.synchronize()
        context.meet("captured")
        of_a_step = len(replica.streamed)
        for number in range(400):
            with replica.runtime.replay_step(ROWS) as step:
                answered = sum(replica.runtime.stats()["requests_by_peer"])
                assert answered >= (number - 1) * of_a_step, "a third graph is launched behind requests"
                step.replay(graph)
        torch.cuda.synchronize()
        assert torch.equal(y, expected(replica, x))
        assert replica.runtime.stats()["reply_wait_ns"] > 0
        context.meet("all replayed")


def test_an_engine_that_never_waits_does_not_fill_the_launch_queue() -> None:
    """Both ranks would block in a launch, each with what the other waits for still to be launched."""
    run_ranks(launch_ahead, 2)


def capture_one_layer(replica: Replica) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()), replica.runtime.capture_step(ROWS, Mode.WAS):
        replica.runtime.fetch_layer(replica.streamed[0])
        replica.runtime.release_layer(replica.streamed[0])


def incomplete(context: RankContext) -> None:
    with open_replica(context, MODEL, backend="nvshmem", max_rows=ROWS, mode="was") as replica:
        x = replica.rows(ROWS)
        mlp(replica.reference[0], x)
        with pytest.raises(UsageError, match="discard it"):
            capture_one_layer(replica)
        torch.cuda.synchronize()
        for seed in range(4):
            replica.step(seed=seed)


def test_a_capture_that_skips_layers_is_refused() -> None:
    run_ranks(incomplete, 2)


def closed_in_a_capture(context: RankContext) -> float:
    with open_replica(context, MODEL, backend="nvshmem", max_rows=ROWS, mode="auto") as replica:
        replica.step(seed=1)
        x = replica.rows(ROWS)
        doubled = x * 2
        torch.cuda.synchronize()
        context.meet("stepped")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # forbids calls to every thread
            y = x * 2
            start = time.monotonic()
            replica.runtime.close()
            seconds = time.monotonic() - start
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, doubled)
        return seconds


def test_close_while_a_stream_is_captured_leaves_both_in_order() -> None:
    assert max(run_ranks(closed_in_a_capture, 2)) < 5, "it waited for its deadline"
