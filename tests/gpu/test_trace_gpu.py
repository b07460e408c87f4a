"""Traces of streams on real GPUs: the same rules as on the host, by the device's times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import SyntheticModel
from helpers.processes import RankContext, run_ranks
from helpers.ranks import open_replica

from sidp_runtime import Mode, tracing

STEPS = 4


def traced_steps(context: RankContext, mode: str) -> dict[str, Any]:
    model = SyntheticModel(num_layers=6, hidden=512, inner=1024)
    with open_replica(context, model, mode=mode, backend="nvshmem", max_rows=4) as replica:
        head = len(replica.head())
        replica.step()
        torch.cuda.synchronize()
        context.meet("warm")  # or a request of the other's first step would be served in this rank's trace
        before = replica.settled_stats(head + replica.runtime.stats()["fetches"])
        with replica.runtime.tracing() as traced:
            context.meet("tracing")
            for seed in range(STEPS):
                replica.step(rows=4, seed=seed)
            torch.cuda.synchronize()
            context.meet("stepped")
            after = replica.settled_stats(head + replica.runtime.stats()["fetches"])
        moved = [a - b for a, b in zip(after["bytes_by_peer"], before["bytes_by_peer"], strict=True)]
        return {"part": traced.part, "moved": moved, "streamed": len(replica.streamed)}


def on_stream(document: dict[str, Any], kind: str, rank: int) -> list[dict[str, Any]]:
    events = [e for e in document["traceEvents"] if e["ph"] == "X" and e["cat"] == kind]
    return sorted((e for e in events if e["pid"] == rank and e["tid"] >= 100), key=lambda e: float(e["ts"]))


def end(event: dict[str, Any]) -> float:
    return float(event["ts"] + event["dur"])


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_streams_are_traced_with_the_devices_times(mode: str) -> None:
    results = run_ranks(traced_steps, 2, mode=mode)
    document = tracing.merge(result["part"] for result in results)
    for rank, result in enumerate(results):
        part = result["part"]
        assert part["dropped"] == part["unfinished"] == 0
        assert 0 < part["stream_error_us"] < 5000  # tests that share the GPU take turns of some ms
        error = 2 * part["stream_error_us"] + 1
        steps = on_stream(document, "step", rank)
        calls = [e for e in part["events"] if e["ph"] == "X" and e["cat"] == "step" and e["tid"] < 100]
        assert len(steps) == len(calls) == STEPS
        for step, call in zip(steps, sorted(calls, key=lambda e: float(e["ts"])), strict=True):
            assert step["ts"] > call["ts"] - error, "the device began before it was asked to"
        for kind in ("wait_full", "use", "request"):
            for event in on_stream(document, kind, rank):
                assert any(step["ts"] <= event["ts"] and end(event) <= end(step) for step in steps), event
        copies = on_stream(document, "copy", rank)
        moved = [0, 0]
        for copy in copies:
            moved[copy["args"]["owner"]] += copy["args"]["bytes"]
            assert copy["dur"] > 0
        assert moved == result["moved"]
        waits = on_stream(document, "wait_full", rank)
        assert len(waits) == (STEPS * result["streamed"] if mode == "was" else 0)
        requests = on_stream(document, "request", rank)
        assert len(requests) == (STEPS * result["streamed"] if mode == "cas" else 0)
        services = on_stream(document, "service", 1 - rank)
        assert len(services) == len(requests)
        between = error + 2 * results[1 - rank]["part"]["stream_error_us"]  # of two devices' clocks
        for request, service in zip(requests, services, strict=True):
            assert request["ts"] - between < service["ts"] < end(request) + between


def replayed(context: RankContext) -> dict[str, Any]:
    """A trace that runs while a step is captured and replayed: nothing of it lands in the graph."""
    model = SyntheticModel(num_layers=4, hidden=64)
    with open_replica(context, model, mode="was", ops=(), backend="nvshmem") as replica:
        replica.step()
        torch.cuda.synchronize()
        graph, runtime = torch.cuda.CUDAGraph(), replica.runtime
        with runtime.tracing(nvtx=True) as traced:
            with torch.cuda.graph(graph), runtime.capture_step(1, Mode.WAS):
                for layer in replica.streamed:
                    replica.fetch(layer)
                    runtime.release_layer(layer)
            for _ in range(STEPS):
                with runtime.replay_step(1) as step:
                    step.replay(graph)
            torch.cuda.synchronize()
        return traced.part


def test_a_replayed_step_is_one_span() -> None:
    for part in run_ranks(replayed, 2):
        kinds = [e["cat"] for e in part["events"] if e["ph"] == "X" and e["tid"] >= 100]
        assert kinds.count("step") == STEPS
        assert kinds.count("wait_full") == kinds.count("use") == 0
        assert kinds.count("copy") > 0
        assert part["unfinished"] == part["dropped"] == 0
