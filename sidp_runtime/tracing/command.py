"""``sidp trace``: a few steps of a group of replicas as one file."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _C, config, errors
from ..errors import ConfigError, DeadlineError, PeerDeadError, SidpError, UnsupportedError
from ..job.replicas import Replica, ReplicaSet, start_fork_server
from . import chrome

SYNTHETIC = "synthetic"
SHAPE: dict[str, int | str] = {"layers": 8, "hidden": 512, "inner": 2048, "dtype": "float32"}
_SET_UP_S = 600.0  # until all replicas have traced: loading a model takes as long as its disk does
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TraceConfig:
    """What to trace. ``model``: a directory, a .gguf file or ``synthetic[:key=value,...]`` with the keys of ``SHAPE``.

    ``tokens``: rows of each step, of each replica.
    """

    model: str
    out: Path
    replicas: int = 2
    mode: str = "auto"
    steps: int = 3
    tokens: int = 16
    backend: str = "host"
    num_events: int = 1 << 15
    nvtx: bool = False

    def check(self) -> dict[str, Any]:
        """What the replicas are given; ``ConfigError`` or ``UnsupportedError`` before any is started."""
        if self.backend not in _C.backend_names():
            known = ", ".join(_C.backend_names())
            raise ConfigError(f"backend {self.backend!r} is not in this build, which has: {known}")
        if not self.out.absolute().parent.is_dir():
            raise ConfigError(f"{self.out.absolute().parent} is not a directory, so {self.out.name} cannot go there")
        settings: dict[str, Any] = {"devices": [None], "shape": None, "model": None}
        if self.model.partition(":")[0] == SYNTHETIC:
            settings["shape"] = parse_shape(self.model)
        elif self.backend != "host":
            raise UnsupportedError(
                f"a model is traced on backend 'host' only; on {self.backend!r} trace --model {SYNTHETIC}:layers=...,"
                "hidden=...,inner=...,dtype=bfloat16 of its shape"
            )
        else:
            settings["model"] = self.model
        if self.backend != "host":
            report = _C.cuda_report()
            if report["reason"]:
                raise UnsupportedError(str(report["reason"]))
            settings["devices"] = list(range(len(report["devices"])))
        own = ("mode", "steps", "tokens", "backend", "num_events", "nvtx")
        return settings | {key: getattr(self, key) for key in own} | {"deadline_ms": config.deadline_ms()}


@dataclass
class TraceReport:
    """What was traced. ``parts``: by rank, with the counters of the traced steps in ``stats``."""

    out: Path
    parts: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Plain text for the terminal."""
        text = [f"{self.out}: open it in ui.perfetto.dev"]
        for part in self.parts:
            kinds = Counter(event["cat"] for event in part["events"] if event["ph"] == "X")
            what = ", ".join(f"{kinds[kind]} {kind}" for kind in ("step", "fetch", "copy", "request", "service"))
            lost = part["dropped"] + part["unfinished"]
            error = f", device times within {part['stream_error_us']:.1f} us" if part["stream_error_us"] else ""
            text.append(f"rank {part['rank']}: {what} events{error}{f'; {lost} are missing' if lost else ''}")
        return text


def parse_shape(text: str) -> dict[str, Any]:
    """``synthetic[:key=value,...]`` as a shape; ``ConfigError`` names what is wrong."""
    shape: dict[str, Any] = dict(SHAPE)
    for item in filter(None, text.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in SHAPE or (key == "dtype") == value.isdecimal() or value == "0":
            raise ConfigError(
                f"{item!r} of --model {text} is not one of {', '.join(f'{k}={v}' for k, v in SHAPE.items())}"
            )
        shape[key] = value if key == "dtype" else int(value)
    if shape["dtype"] not in _DTYPES:
        raise ConfigError(f"dtype {shape['dtype']!r} is not one of {', '.join(_DTYPES)}")
    return shape


def run(trace: TraceConfig) -> TraceReport:
    """Traces and writes ``trace.out``. Raises what a replica reports, ``PeerDeadError`` when one dies."""
    settings = trace.check()
    start_fork_server(("sidp_runtime.tracing.replica",))
    from . import replica

    with tempfile.TemporaryDirectory(prefix="sidp-trace-") as folder:
        group = ReplicaSet(
            trace.replicas, settings | {"folder": folder}, replica.run_trace, deadline_ms=settings["deadline_ms"]
        )
        graceful = False
        try:
            _wait(group)
            graceful = True
        finally:
            group.end(graceful=graceful)
        parts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(trace.replicas)]
    chrome.write(trace.out, [{key: part[key] for key in part if key != "stats"} for part in parts])
    return TraceReport(trace.out, parts)


def _wait(group: ReplicaSet) -> None:
    limit = time.monotonic() + _SET_UP_S
    while not all(replica.stats for replica in group.replicas):
        for replica, message in group.poll(0.5):
            if message is None:
                raise PeerDeadError(f"replica {replica.rank} {replica.words}", rank=replica.rank)
            if message["type"] == "error":
                raise _error(replica, message)
            if message["type"] == "stats":
                replica.stats = message["stats"]
        if time.monotonic() > limit:
            raise DeadlineError(f"the replicas did not finish within {_SET_UP_S:.0f} s")


def _error(replica: Replica, message: dict[str, Any]) -> SidpError:
    kind = getattr(errors, message["error"], SidpError)
    known = kind if isinstance(kind, type) and issubclass(kind, SidpError) else SidpError
    return known(f"replica {replica.rank} reports {message['error']}: {message['message']}", rank=replica.rank)
