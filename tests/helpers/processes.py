"""Rank processes with a bounded join.

Ranks are forked from a server that has torch and the package loaded, so a rank starts in milliseconds. What they share
lies in a folder: their store, and each one's result, as JSON, and output, which every report quotes.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

import sidp_runtime as sidp
from sidp_runtime.errors import SidpError
from sidp_runtime.group import Store

_server = multiprocessing.get_context("forkserver")
# pytest: a forked process runs the main module of the test session again, under another name
_preload = ["torch._dynamo", "torch._inductor", "sidp_runtime.runtime", "pytest"]
if os.environ.get("SIDP_TEST_GPU") != "1":  # transformers may ask for GPUs, and then no forked process could use them
    _preload.append("helpers.hf")
_server.set_forkserver_preload(_preload)

_NUMBERS = ("rank", "peer", "layer", "num_bytes", "waited_ms", "expected", "seen")
_FLUSH_S = 0.3  # for a stack dump to reach the file
_GRACE_S = 1.0  # for the others to report their own errors once one rank has failed

RankFunction = Callable[..., Any]


@dataclass(frozen=True)
class RankContext:
    """What a rank process knows. ``index`` counts processes; ``rank`` is what it claims to be."""

    index: int
    rank: int
    world_size: int
    token: str
    folder: Path

    def store(self) -> Store:
        """A file: a TCPStore asks the name server for the name of each client, which may take seconds."""
        store: Store = dist.FileStore(str(self.folder / "store"))  # type: ignore[attr-defined]
        return store

    def device(self, backend: str) -> torch.device:
        """Where a backend's pool lies: ranks share the GPUs in turn, equally many on each, as NVSHMEM demands."""
        if backend == "host":
            return torch.device("cpu")
        used = max(n for n in range(1, torch.cuda.device_count() + 1) if self.world_size % n == 0)
        return torch.device("cuda", self.rank % used)

    def group(
        self, *, deadline_ms: int | None = None, store: Store | None = None, backend: str = "host", **arguments: Any
    ) -> sidp.Group:
        """The group of this run; collective. On GPUs set-up has longer: CUDA loads all kernels in every process."""
        return sidp.Group(
            self.rank,
            self.world_size,
            store or self.store(),
            backend=backend,
            token=self.token,
            deadline_ms=deadline_ms or (10_000 if backend == "host" else 60_000),
            device=self.device(backend).index,
            **arguments,
        )

    def mark(self, name: str) -> None:
        """Says to the test and the other ranks that something has happened."""
        (self.folder / name).touch()

    def marked(self, name: str) -> bool:
        return (self.folder / name).exists()

    def wait_for(self, name: str, timeout_s: float = 20) -> None:
        _wait_for(self.folder / name, timeout_s)

    def meet(self, name: str, timeout_s: float = 20) -> None:
        """A barrier of the test's own: it does not go through what is tested."""
        self.mark(f"{name}-{self.rank}")
        for rank in range(self.world_size):
            self.wait_for(f"{name}-{rank}", timeout_s)


@dataclass(frozen=True)
class RankOutcome:
    """How a rank process ended. ``error``: class name, message and numbers of what its function raised."""

    index: int
    rank: int
    exit_code: int | None
    value: Any
    error: dict[str, Any] | None
    output: str
    overdue: bool

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.overdue

    def describe(self) -> str:
        if self.overdue:
            how = "did not finish in time and was killed"
        elif self.error is not None:
            how = f"raised {self.error['type']}: {self.error['message']}"
        else:
            how = f"ended with exit code {self.exit_code}"
        return f"--- process {self.index}, rank {self.rank}: {how}\n{self.output}"


class RankFailureError(AssertionError):
    """A rank failed, hung, or left shared memory behind; the message quotes every rank's output."""


def _wait_for(path: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody marked {path.name!r} within {timeout_s} s")
        time.sleep(0.001)


def _rank_main(function: RankFunction, context: RankContext, arguments: dict[str, Any]) -> None:
    output = os.open(context.folder / f"{context.index}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
    torch.set_num_threads(1)
    document: dict[str, Any] = {}
    try:
        document["value"] = function(context, **arguments)
    except Exception as error:
        traceback.print_exc()
        document["error"] = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, SidpError):
            document["error"] |= {name: getattr(error, name) for name in _NUMBERS}
    scratch = context.folder / f"{context.index}.tmp"
    scratch.write_text(json.dumps(document))
    scratch.rename(context.folder / f"{context.index}.json")
    sys.stdout.flush()
    if "error" in document:
        sys.exit(1)


class Ranks:
    """Processes of one group; a context manager that leaves no process, file or shared memory behind.

    ``ranks``: what each process claims to be, by default 0 .. ``world_size`` - 1. ``per_rank``: arguments that differ,
    by process.
    """

    def __init__(
        self,
        function: RankFunction,
        world_size: int,
        *,
        ranks: Sequence[int] | None = None,
        per_rank: Sequence[Mapping[str, Any]] | None = None,
        timeout_s: float = 120,
        **arguments: Any,
    ) -> None:
        self.token = secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="sidp-test-"))
        self._world_size = world_size
        self._end = time.monotonic() + timeout_s
        self._processes = []
        self._ranks = list(range(world_size)) if ranks is None else list(ranks)
        for index, rank in enumerate(self._ranks):
            context = RankContext(index, rank, world_size, self.token, self.folder)
            mine = arguments | dict(per_rank[index] if per_rank else {})
            process = _server.Process(target=_rank_main, args=(function, context, mine), daemon=True)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
            process.join(10)
        for name in self.left_behind():
            Path("/dev/shm", name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def pid(self, index: int) -> int:
        pid = self._processes[index].pid
        assert pid is not None
        return pid

    def signal(self, index: int, number: int) -> None:
        """Sends a signal to one process that has not ended."""
        assert self._processes[index].exitcode is None, f"process {index} has ended already"
        os.kill(self.pid(index), number)

    def kill(self, index: int) -> None:
        """SIGKILL; returns once the process has ended."""
        self.signal(index, signal.SIGKILL)
        self._processes[index].join(10)

    def mark(self, name: str) -> None:
        (self.folder / name).touch()

    def wait_for(self, name: str, timeout_s: float = 20) -> None:
        """Until a rank has marked it; fails at once if a process ends in error meanwhile."""
        end = min(self._end, time.monotonic() + timeout_s)
        while not (self.folder / name).exists():
            failed = [p.exitcode for p in self._processes if p.exitcode not in (None, 0)]
            if failed or time.monotonic() > end:
                raise RankFailureError(f"nobody marked {name!r}\n{self._report(self.join(0.0))}")
            time.sleep(0.001)

    def join(self, timeout_s: float | None = None, *, stop_on_failure: bool = False) -> list[RankOutcome]:
        """Waits for all; what is late is asked for its stacks, then killed."""
        end = self._end if timeout_s is None else time.monotonic() + timeout_s
        while waiting := [p for p in self._processes if p.exitcode is None]:
            left = end - time.monotonic()
            if left <= 0:
                break
            connection.wait([p.sentinel for p in waiting], left)
            if stop_on_failure and any(p.exitcode not in (None, 0) for p in self._processes):
                end = min(end, time.monotonic() + _GRACE_S)
        overdue = {index for index, p in enumerate(self._processes) if p.exitcode is None}
        for index in overdue:
            os.kill(self.pid(index), signal.SIGUSR1)
        if overdue:
            time.sleep(_FLUSH_S)
        for index in overdue:
            self._processes[index].kill()
            self._processes[index].join(10)
        return [self._outcome(index, index in overdue) for index in range(len(self._processes))]

    def left_behind(self) -> list[str]:
        """Names of this group in /dev/shm."""
        return sorted(path.name for path in Path("/dev/shm").glob(f"sidp-{self.token}-*"))

    def check(self, outcomes: Sequence[RankOutcome]) -> None:
        """Every rank returned, and no name is left in /dev/shm."""
        left = self.left_behind()
        if left or not all(outcome.ok for outcome in outcomes):
            raise RankFailureError(f"left in /dev/shm: {left}\n{self._report(outcomes)}")

    @staticmethod
    def _report(outcomes: Sequence[RankOutcome]) -> str:
        return "\n".join(outcome.describe() for outcome in outcomes)

    def _outcome(self, index: int, overdue: bool) -> RankOutcome:
        path, output = self.folder / f"{index}.json", self.folder / f"{index}.out"
        document = json.loads(path.read_text()) if path.exists() else {}
        return RankOutcome(
            index=index,
            rank=self._ranks[index],
            exit_code=self._processes[index].exitcode,
            value=document.get("value"),
            error=document.get("error"),
            output=output.read_text(errors="replace") if output.exists() else "(it never started)",
            overdue=overdue,
        )


def run_ranks(function: RankFunction, world_size: int, **arguments: Any) -> list[Any]:
    """Runs ``function(context, **arguments)`` on every rank; their results by rank. Takes what ``Ranks`` takes."""
    with Ranks(function, world_size, **arguments) as ranks:
        outcomes = ranks.join(stop_on_failure=True)
        ranks.check(outcomes)
        return [outcome.value for outcome in outcomes]
