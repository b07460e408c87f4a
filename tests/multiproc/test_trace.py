"""Traces of ranks: what is in the file is what happened, in order, and agrees with the counters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import RankContext, run_ranks
from helpers.ranks import Replica, open_replica
from typer.testing import CliRunner

from sidp_runtime import cli, tracing
from sidp_runtime.errors import ConfigError, UnsupportedError, UsageError
from sidp_runtime.tracing import command
from sidp_runtime.tracing.session import WithRanges

STEPS = 3
Event = dict[str, Any]


def ns(event: Event) -> tuple[int, int]:
    """Begin and end; a file has microseconds with three digits."""
    return round(event["ts"] * 1000), round(event["ts"] * 1000) + round(event["dur"] * 1000)


def spans(document: dict[str, Any], *kinds: str, rank: int | None = None) -> list[Event]:
    return sorted(
        (
            event
            for event in document["traceEvents"]
            if event["ph"] == "X" and (not kinds or event["cat"] in kinds) and rank in (None, event["pid"])
        ),
        key=lambda event: ns(event),
    )


def inside(inner: Event, outer: Event) -> bool:
    return ns(outer)[0] <= ns(inner)[0] and ns(inner)[1] <= ns(outer)[1]


def assert_nested(events: Iterable[Event]) -> None:
    """Spans of one track contain each other or do not touch: what viewers require of complete events."""
    open_spans: list[Event] = []
    for event in sorted(events, key=lambda e: (ns(e)[0], -ns(e)[1])):
        while open_spans and ns(open_spans[-1])[1] <= ns(event)[0]:
            open_spans.pop()
        assert not open_spans or inside(event, open_spans[-1]), f"{event} straddles {open_spans[-1]}"
        open_spans.append(event)


def more(after: list[int], before: list[int]) -> list[int]:
    return [a - b for a, b in zip(after, before, strict=True)]


def traced_steps(context: RankContext, backend: str, mode: str, folder: str) -> dict[str, Any]:
    with open_replica(context, mode=mode, backend=backend) as replica:
        head = len(replica.head())
        replica.step()
        before = replica.settled_stats(head + replica.runtime.stats()["fetches"])
        path = Path(folder) / f"{context.rank}.json"
        with replica.runtime.tracing(path) as traced:
            context.meet("tracing")
            for seed in range(STEPS):
                replica.step(rows=2 + seed, seed=seed)
            context.meet("stepped")
            after = replica.settled_stats(head + replica.runtime.stats()["fetches"])
        assert json.loads(path.read_text()) == json.loads(json.dumps(tracing.merge([traced.part])))
        counters = ("bytes_by_peer", "requests_by_peer", "served_by_peer")
        return {
            "part": traced.part,
            "streamed": replica.streamed,
            "head": replica.head(),
            **{key: more(after[key], before[key]) for key in counters},
        }


@pytest.fixture(scope="module", params=["was", "cas"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(mode: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(traced_steps, 3, backend="host", mode=mode, folder=str(tmp_path_factory.mktemp("traces")))


@pytest.fixture(scope="module")
def document(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return tracing.merge(rank["part"] for rank in ranks)


def test_spans_of_a_track_nest_and_calls_lie_in_a_step(document: dict[str, Any], mode: str) -> None:
    tracks = {(event["pid"], event["tid"]) for event in spans(document)}
    for rank, tid in tracks:
        assert_nested(event for event in spans(document, rank=rank) if event["tid"] == tid)
    for rank in range(3):
        steps = spans(document, "step", rank=rank)
        assert [step["args"] for step in steps] == [
            {"tokens": 2 + seed, "mode": mode, "reason": "fixed", "broken_off": False} for seed in range(STEPS)
        ]
        for event in spans(document, "fetch", "wait_full", "use", "release", "request", "wait_reply", rank=rank):
            assert any(inside(event, step) for step in steps), event


def test_every_track_and_process_has_a_name(document: dict[str, Any]) -> None:
    named = {(e["pid"], e["tid"]) for e in document["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in spans(document)}
    names = {e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"rank 0", "rank 1", "rank 2"}


def test_a_copy_is_over_when_its_fetch_is(ranks: list[dict[str, Any]], document: dict[str, Any], mode: str) -> None:
    for rank, result in enumerate(ranks):
        for layer in result["streamed"]:
            copies = [e for e in spans(document, "copy", rank=rank) if e["args"]["layer"] == layer]
            fetches = [e for e in spans(document, "fetch", rank=rank) if e["args"]["layer"] == layer]
            early = int(layer in result["head"])  # the ring held it when the trace began
            assert len(fetches) == (STEPS if mode == "was" else 0)
            assert len(copies) == len(fetches)  # so one more was made for the step after the last
            for copy, fetch in zip(copies, fetches[early:], strict=False):
                assert ns(copy)[1] <= ns(fetch)[1]


def test_bytes_and_requests_are_those_of_the_counters(ranks: list[dict[str, Any]], document: dict[str, Any]) -> None:
    for rank, result in enumerate(ranks):
        moved, asked, served = [0] * 3, Counter(), Counter()  # type: ignore[var-annotated]
        for copy in spans(document, "copy", rank=rank):
            moved[copy["args"]["owner"]] += copy["args"]["bytes"]
        for event in spans(document, "request", rank=rank):
            asked[event["args"]["owner"]] += 1
        for event in spans(document, "service", rank=rank):
            served[event["args"]["requester"]] += 1
        assert moved == result["bytes_by_peer"]
        assert [asked[peer] for peer in range(3)] == result["requests_by_peer"]
        assert [served[peer] for peer in range(3)] == result["served_by_peer"]


def test_a_service_lies_within_its_requesters_round_trip(document: dict[str, Any], mode: str) -> None:
    asked: dict[Any, list[Event]] = {}
    for event in spans(document, "request"):
        asked.setdefault((event["pid"], event["args"]["owner"]), []).append(event)
    services = spans(document, "service")
    assert bool(services) == (mode == "cas")
    for service in services:
        request = asked[service["args"]["requester"], service["pid"]].pop(0)
        assert inside(service, request), (service, request)
        assert [request["args"][key] for key in ("layer", "op", "rows")] == [
            service["args"][key] for key in ("layer", "op", "rows")
        ]
        assert request["args"]["op"] == "mlp"
    assert not any(asked.values())
    arrows = Counter(event["ph"] for event in document["traceEvents"] if event.get("cat") == "arrow")
    assert arrows == ({"s": len(services), "f": len(services)} if services else {})


def test_computing_lies_between_fetch_and_release(document: dict[str, Any], mode: str) -> None:
    for rank in range(3):
        calls = {
            kind: [(e["args"]["layer"], ns(e)) for e in spans(document, kind, rank=rank)]
            for kind in ("fetch", "use", "release")
        }
        assert len(calls["use"]) == len(calls["fetch"]) > 0
        for (a, fetched), (b, used), (c, released) in zip(*calls.values(), strict=True):
            assert a == b == c
            assert fetched[1] <= used[0] <= used[1] <= released[0]


def test_overlapping_uses_get_tracks_of_their_own() -> None:
    uses = [{"ts": ts, "dur": dur, "tid": 10} for ts, dur in ((0.0, 5.0), (2.0, 2.0), (4.0, 3.0), (5.0, 1.0))]
    tracing.chrome._separate(uses)
    assert [use["tid"] for use in uses] == [11, 12, 12, 11]


def edges(context: RankContext) -> None:
    with open_replica(context, mode="was") as replica:
        runtime = replica.runtime
        with pytest.raises(ConfigError, match="num_events is 0"):
            runtime.tracing(num_events=0)
        with runtime.tracing(num_events=4) as traced:
            with pytest.raises(UsageError, match="runs already"), runtime.tracing():
                pass
            replica.step()
        kept = [event["cat"] for event in traced.part["events"] if event["ph"] == "X"]
        assert len(kept) == 4
        assert traced.part["dropped"] > 4
        labels = [e["args"]["labels"] for e in traced.part["events"] if e["name"] == "process_labels"]
        assert labels == [f"{traced.part['dropped']} events are missing"]

        def refused_in_a_step(layer: int) -> None:
            with pytest.raises(UsageError, match="between steps"), runtime.tracing():
                pass

        replica.step(between=refused_in_a_step)
        step = broken_off_step(replica)
        assert step["args"]["broken_off"]
        assert step["name"] == "step was"
        step = step_left_open(replica)
        assert step["args"]["broken_off"]
        assert runtime.stats()["steps"]["was"] == 3  # it went on
        with runtime.tracing() as closed_inside:
            replica.step()
            context.meet("stepped")
            runtime.close()
        assert any(event["cat"] == "step" for event in closed_inside.part["events"] if event["ph"] == "X")


def broken_off_step(replica: Replica) -> Event:
    traced = replica.runtime.tracing()
    with suppress(ZeroDivisionError), traced, replica.runtime.step(num_tokens=1):
        replica.runtime.fetch_layer(replica.streamed[0])
        raise ZeroDivisionError
    (step,) = (event for event in traced.part["events"] if event["ph"] == "X" and event["cat"] == "step")
    return step


def step_left_open(replica: Replica) -> Event:
    runtime = replica.runtime
    with runtime.tracing() as traced:
        runtime.begin_step(1)
        runtime.fetch_layer(replica.streamed[0])
    runtime.release_layer(replica.streamed[0])
    for layer in replica.streamed[1:]:
        runtime.fetch_layer(layer)
        runtime.release_layer(layer)
    runtime.end_step()
    (step,) = (event for event in traced.part["events"] if event["ph"] == "X" and event["cat"] == "step")
    return step


def test_room_usage_errors_and_steps_that_break_off() -> None:
    run_ranks(edges, 2)


def with_ranges(context: RankContext) -> None:
    with open_replica(context, mode="cas") as replica:
        runtime = replica.runtime
        log: list[str] = []
        runtime._open_core = WithRanges(runtime._core, ["mlp"], log.append, lambda: log.append("pop"))  # type: ignore[assignment, arg-type]
        replica.step(rows=2)
        opened = [name for name in log if name != "pop"]
        assert opened[0] == "step cas, 2 tokens"
        assert log[-1] == "pop"
        assert len(log) == 2 * len(opened)
        local, remote = replica.pool.local_layers[0], replica.streamed[0]
        for name in (f"fetch layer {local}", f"release layer {local}", f"remote_compute layer {remote} mlp"):
            assert log[log.index(name) + 1] == "pop"
        runtime.begin_step(1)
        runtime._core.leave_step()  # the trace ends
        assert log[-2:] == ["step cas, 1 tokens", "pop"]
        runtime.end_step(broken_off=True)
        assert log[-2:] == ["step cas, 1 tokens", "pop"]
        context.meet("stepped")


def test_nvtx_ranges_name_steps_and_calls() -> None:
    run_ranks(with_ranges, 2)


def without_nvtx(context: RankContext) -> None:
    with open_replica(context, mode="was") as replica:
        with pytest.raises(UnsupportedError, match="no NVTX"), replica.runtime.tracing(nvtx=True):
            pass
        with replica.runtime.tracing():  # nothing was left on
            replica.step()


def test_nvtx_needs_a_torch_that_has_it() -> None:
    import torch

    if torch.version.cuda is None:
        run_ranks(without_nvtx, 1)


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_the_command_writes_one_file_of_all_ranks(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "trace.json"
    shape = "synthetic:layers=4,hidden=32,inner=64"
    arguments = ["--model", shape, "--mode", mode, "--steps", "2", "--tokens", "4", "--out", str(out)]
    result = CliRunner().invoke(cli.app, ["trace", *arguments, "--debug"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "rank 1: 2 step" in result.output
    document = json.loads(out.read_text())
    assert set(document["otherData"]["ranks"]) == {"0", "1"}
    for rank in range(2):
        assert len(spans(document, "step", rank=rank)) == 2
        assert len(spans(document, "copy" if mode == "was" else "service", rank=rank)) == 2 * 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("synthetic:layers=0", "is not one of layers=8"),
        ("synthetic:width=3", "'width=3'"),
        ("synthetic:hidden=x", "'hidden=x'"),
        ("synthetic:dtype=int8", "dtype 'int8'"),
    ],
)
def test_a_wrong_shape_is_refused(model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.parse_shape(model)


def test_what_cannot_be_traced_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backend 'x' is not in this build"):
        command.TraceConfig("synthetic", tmp_path / "t.json", backend="x").check()
    with pytest.raises(ConfigError, match="is not a directory"):
        command.TraceConfig("synthetic", tmp_path / "none" / "t.json").check()
    with pytest.raises(UnsupportedError, match="on backend 'host' only"):
        command.TraceConfig("model", tmp_path / "t.json", backend="nvshmem").check()
