"""The events of a trace in the Trace Event Format (Google, "Trace Event Format", 2016), which Perfetto reads.

A process is a rank, a thread one of its tracks. Times are microseconds of CLOCK_MONOTONIC, which all processes of a
host share, so the parts of several ranks are merged as they are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import _C
from .._C import Mode

Event = dict[str, Any]
#: One rank's share of a file: ``rank``, ``events``, ``dropped``, ``unfinished``, ``stream_error_us``.
Part = dict[str, Any]

_TRACKS = {"engine": 10, "lane": 20, "service": 30}
_IN_USE = 11  # and up: layers that are in use at the same time lie on tracks of their own
_ON_STREAM = 100

_NAMES = {
    "step": "step {mode}",
    "fetch": "fetch layer {layer}",
    "wait_full": "wait for layer {layer}",
    "use": "compute layer {layer}",
    "release": "release layer {layer}",
    "request": "remote_compute layer {layer} {op}",
    "wait_reply": "wait for the reply",
    "stand_in": "stand in for the owner, layer {layer} {op}",
    "wait_empty": "wait for the slot of layer {layer}",
    "wait_link": "wait for the link of layer {layer}",
    "copy": "copy layer {layer}",
    "queue_copy": "queue the copy of layer {layer}",
    "service": "serve layer {layer} {op}",
    "op": "{op}",
}
_PEERS = {
    "request": "owner",
    "wait_reply": "owner",
    "stand_in": "owner",
    "wait_link": "owner",
    "copy": "owner",
    "service": "requester",
}


def part_of(trace: _C.Trace, rank: int, op_names: Sequence[str]) -> Part:
    """The part of one rank; ``op_names`` by index, as the runtime was given them."""
    events = [_event(event, rank, op_names) for event in trace.events]
    _separate([event for event in events if event["cat"] == "use"])
    events.sort(key=lambda event: (event["ts"], -event["dur"]))  # whatever contains comes before what it contains
    return {
        "rank": rank,
        "events": _labels(rank, events, trace.dropped + trace.unfinished) + events,
        "dropped": trace.dropped,
        "unfinished": trace.unfinished,
        "stream_error_us": trace.stream_error_ns / 1000,
    }


def merge(parts: Iterable[Part]) -> dict[str, Any]:
    """The document of several ranks, with an arrow from each request to its service."""
    parts = sorted(parts, key=lambda part: int(part["rank"]))
    events = [event for part in parts for event in part["events"]]
    ranks = {str(part["rank"]): {key: part[key] for key in part if key not in ("rank", "events")} for part in parts}
    return {
        "traceEvents": events + _arrows(events),
        "displayTimeUnit": "ns",
        "otherData": {"clock": "CLOCK_MONOTONIC", "ranks": ranks},
    }


def write(path: Path | str, parts: Iterable[Part]) -> None:
    """Writes the merged document."""
    Path(path).write_text(json.dumps(merge(parts)) + "\n", encoding="utf-8")


def _event(event: _C.TraceEvent, rank: int, op_names: Sequence[str]) -> Event:
    kind = event.kind
    mode = "was" if event.mode == Mode.WAS else "cas"
    op = op_names[event.op] if 0 <= event.op < len(op_names) else f"op {event.op}"
    args: dict[str, Any] = {}
    if kind == "step":
        args = {"tokens": event.rows, "mode": mode, "reason": event.reason, "broken_off": event.broken_off}
    else:
        args["layer"] = event.layer
        if event.op >= 0:
            args |= {"op": op, "rows": event.rows}
        if kind in _PEERS:
            args[_PEERS[kind]] = event.peer
        if event.bytes:
            args["bytes"] = event.bytes
        if kind == "copy" and event.end > event.begin:
            args["GB/s"] = round(event.bytes / (event.end - event.begin), 3)
    return {
        "ph": "X",
        "name": _NAMES[kind].format(mode=mode, layer=event.layer, op=op),
        "cat": kind,
        "pid": rank,
        "tid": _TRACKS[event.track] + _ON_STREAM * event.on_stream,
        "ts": event.begin / 1000,
        "dur": (event.end - event.begin) / 1000,
        "args": args,
    }


def _separate(uses: list[Event]) -> None:
    """Puts each on the first track that is free: spans of one track either nest or do not touch."""
    free_at: list[float] = []
    for use in sorted(uses, key=lambda event: float(event["ts"])):
        track = next((i for i, end in enumerate(free_at) if end <= use["ts"]), len(free_at))
        free_at[track : track + 1] = [use["ts"] + use["dur"]]
        use["tid"] += _IN_USE - _TRACKS["engine"] + track


def _labels(rank: int, events: Sequence[Event], lost: int) -> list[Event]:
    def label(what: str, tid: int, **args: Any) -> Event:
        return {"ph": "M", "name": what, "pid": rank, "tid": tid, "args": args}

    labels = [label("process_name", 0, name=f"rank {rank}"), label("process_sort_index", 0, sort_index=rank)]
    if lost:
        labels.append(label("process_labels", 0, labels=f"{lost} events are missing"))
    for tid in sorted({event["tid"] for event in events}):
        on_stream, track = divmod(tid, _ON_STREAM)
        name = next((name for name, base in _TRACKS.items() if base == track), "layers in use")
        labels.append(label("thread_name", tid, name=f"{name}{' (stream)' if on_stream else ''}"))
        labels.append(label("thread_sort_index", tid, sort_index=tid))
    return labels


def _arrows(events: Sequence[Event]) -> list[Event]:
    """A flow from each request to the service that answered it: the one of its layer and op while it was under way."""
    asked: defaultdict[tuple[Any, ...], list[Event]] = defaultdict(list)
    for event in events:
        if event["cat" if event["ph"] == "X" else "ph"] == "request":
            args = event["args"]
            asked[event["tid"] >= _ON_STREAM, event["pid"], args["owner"], args["layer"], args["op"]].append(event)
    arrows: list[Event] = []
    for service in (event for event in events if event["ph"] == "X" and event["cat"] == "service"):
        args = service["args"]
        key = (service["tid"] >= _ON_STREAM, args["requester"], service["pid"], args["layer"], args["op"])
        for request in asked[key]:
            if request["ts"] <= service["ts"] <= request["ts"] + request["dur"]:
                flow = {"cat": "arrow", "name": "request", "id": len(arrows) // 2 + 1}
                arrows.append({"ph": "s", **flow, **{k: request[k] for k in ("pid", "tid", "ts")}})
                arrows.append({"ph": "f", "bp": "e", **flow, **{k: service[k] for k in ("pid", "tid", "ts")}})
                break
    return arrows
