"""Starts the processes of each case, bounds them, and collects their figures."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from multiprocessing import connection
from pathlib import Path
from typing import Any

from rich.console import Console

from sidp_runtime import _C, _torch
from sidp_runtime.errors import ConfigError, UnsupportedError

from . import environment
from .cases import CASES
from .harness import Case, Figure, Report, render
from .shapes import SHAPES, default_shape

CASES_PACKAGE = f"{__package__}.cases"
_GRACE_S = 3.0  # for the other ranks to end by themselves once one has failed
_START_S = 30.0  # of a rank's start on a GPU: CUDA loads all kernels, NVSHMEM starts

# Ranks are forked from a server that has torch loaded, capture of ops included, and has not touched CUDA.
_server = multiprocessing.get_context("forkserver")


def select(patterns: Sequence[str], backend: str, table: Sequence[Case]) -> list[Case]:
    """The cases of a backend whose keys match a pattern. ``ConfigError`` for a pattern that matches none."""
    if unknown := [p for p in patterns if not any(fnmatchcase(case.key, p) for case in table)]:
        known = ", ".join(case.key for case in table)
        raise ConfigError(f"no case is called {', '.join(unknown)}; there are: {known}")
    chosen = [c for c in table if not patterns or any(fnmatchcase(c.key, p) for p in patterns)]
    if not (found := [case for case in chosen if backend in case.backends]):
        raise ConfigError(f"none of {', '.join(c.key for c in chosen)} runs on backend {backend!r}")
    return found


def run(
    *,
    command: str,
    patterns: Sequence[str] = (),
    backend: str = "host",
    quick: bool = False,
    shape: str | None = None,
    ranks: Sequence[int] = (),
    table: Sequence[Case] = CASES,
    limit_s: float = 480,
    json_path: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Runs cases one after the other and prints each one's table, and writes the figures so far, when it is done.

    ``limit_s``: a case that would begin after so long has an error row instead. ``ranks``: counts of processes that
    each case runs with, by default what it needs. Raises ``ConfigError``, and ``UnsupportedError`` where the backend
    cannot run.
    """
    console = console or Console()
    cases = select(patterns, backend, table)
    gpus = 0
    if backend == "nvshmem":
        from sidp_runtime import _nvshmem

        if reason := _nvshmem.missing():
            raise UnsupportedError(f"backend 'nvshmem': {reason}")
        gpus = environment.num_gpus()
    elif backend not in _C.backend_names():
        raise ConfigError(f"backend {backend!r} is not in this build, which has: {', '.join(_C.backend_names())}")
    name = shape or default_shape(backend, quick)
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    report = Report(command, backend, name, environment.environment())
    _server.set_forkserver_preload(["torch", "torch._dynamo", "sidp_runtime.runtime", f"{__package__}.rank"])
    start = time.monotonic()
    for case in cases:
        for world_size in ranks or [case.world_size(gpus)]:
            first, spent = len(report.figures), time.monotonic() - start
            if spent > limit_s:
                reason = f"not begun: {spent:.0f} s were spent"
                report.figures.append(Figure(case.key, "run", "case", "", status="error", reason=reason))
            else:
                ran = _run_case(case, report, world_size, quick, gpus, min(case.deadline_s, limit_s - spent))
                shared = f" that SHARE {gpus} GPU" if ran["shared_gpu"] else ""
                console.rule(f"{case.key} ({ran['seconds']:.1f} s, {world_size} ranks{shared})")
                render(report.figures[first:], console)
            if json_path is not None:
                report.write(json_path)
    console.print(f"{time.monotonic() - start:.0f} s of {limit_s:.0f}")
    return report


def _run_case(case: Case, report: Report, world_size: int, quick: bool, gpus: int, deadline_s: float) -> dict[str, Any]:
    """Its figures go to the report; what it says of the processes is also returned."""
    store, _, port = _torch.make_store_server()
    token = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="sidp-bench-"))
    begin = time.monotonic()
    arguments = {
        "case": case.key,
        "world_size": world_size,
        "backend": report.backend,
        "shape": SHAPES[report.shape],
        "quick": quick,
        "token": token,
        "port": port,
        "rows": folder / "rows.jsonl",
        "num_gpus": gpus,
    }
    processes = [
        _server.Process(target=_rank_main, args=(CASES_PACKAGE, arguments | {"rank": rank}), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        overdue = _join(processes, deadline_s + (_START_S if gpus else 0))
        for rank in range(world_size):
            _collect(folder / f"rows-{rank}.jsonl", report, world_size)
        ended = [p.exitcode for p in processes]
        if overdue or any(ended):
            late = f"killed after {time.monotonic() - begin:.0f} s: " if overdue else ""
            first = next((r for r, code in enumerate(ended) if code and r not in overdue), min(overdue, default=0))
            text = (folder / f"{first}.out").read_text(errors="replace") if (folder / f"{first}.out").exists() else ""
            words = " | ".join(text.strip().splitlines()[-12:])
            reason = f"{late}exit codes by rank {ended}; rank {first}: {words}"
            report.figures.append(Figure(case.key, "run", "case", "", status="error", reason=reason))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        _C.unlink_segments(token, world_size)
        shutil.rmtree(folder, ignore_errors=True)
        del store
    ran = {
        "world_size": world_size,
        "gpus": gpus,
        "shared_gpu": 0 < gpus < world_size,
        "seconds": time.monotonic() - begin,
    }
    report.ranks[case.key if case.key not in report.ranks else f"{case.key} ranks={world_size}"] = ran
    return ran


def _join(processes: Sequence[Any], deadline_s: float) -> set[int]:
    """Waits for all. Once one has failed the others have a few seconds. Ranks that were late, and are killed."""
    end = time.monotonic() + deadline_s
    failed = False
    while waiting := [p for p in processes if p.exitcode is None]:
        left = end - time.monotonic()
        if left <= 0:
            break
        connection.wait([p.sentinel for p in waiting], left)
        if not failed and any(p.exitcode not in (None, 0) for p in processes):
            failed = True
            end = min(end, time.monotonic() + _GRACE_S)
    late = {rank for rank, p in enumerate(processes) if p.exitcode is None}
    for rank in late:
        processes[rank].kill()
        processes[rank].join(10)
    return late


def _collect(path: Path, report: Report, world_size: int) -> None:
    if not path.exists():
        return
    for line in path.read_text().split("\n")[:-1]:  # what follows the last end of a line was cut off by a kill
        document = json.loads(line)
        if "event" in document:
            report.timeline.append(document["event"])
            continue
        figure = Figure.from_json(document)
        if figure.bar is not None and min(environment.num_gpus(), world_size) < document["bar_gpus"]:
            figure = replace(figure, bar=None)  # it does not hold of so few
        report.figures.append(figure)


def _rank_main(cases: str, arguments: dict[str, Any]) -> None:
    folder = Path(arguments["rows"]).parent
    output = os.open(folder / f"{arguments['rank']}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        import torch

        from .rank import RankContext, on_own_stream

        if os.environ.get("NVSHMEM_DISABLE_NVLS") == "1":  # no multicast on this machine: for peers neither
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        torch.set_num_threads(1)
        context = RankContext(**arguments)
        module = importlib.import_module(f"{cases}.{context.case}")
        if context.on_gpu:
            context.group  # noqa: B018 - chooses the device before anything starts CUDA
        gc.disable()  # a collection in a process with torch takes tens of milliseconds
        with on_own_stream(context), torch.no_grad():
            module.run(context)
        context.meet()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # whatever threads of a library still wait for
