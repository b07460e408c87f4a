"""Processes that answer over pipes: awaited all at once, and ended with all that they started."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil

_ERROR = re.compile(r"\b\w*(Error|Exception): ?\S")
_NO_ERROR = re.compile(r"\b(DEBUG|INFO|WARNING)\b")
_TERM_S = 3.0  # for resource trackers to take away shared memory and semaphores
_STACKS_S = 1.0  # for stacks to reach the logs
_GONE_S = 20.0  # for the kernel to take back what killed processes held, a GPU's memory among it

#: Runs in an engine's process: answers with ``link.send(("ok", value))``, when it is ready and to each message.
Serve = Callable[[Any, dict[str, Any]], None]


class EngineError(RuntimeError):
    """An engine said that it failed, or ended, or gave no answer in time. Its log's error is in the message.

    The stacks of all threads of the engines that are left are then in their logs.
    """


class Engines:
    """One process for each of ``settings``, each in a session of its own with its output in ``logs``."""

    def __init__(self, serve: Serve, settings: Sequence[dict[str, Any]], logs: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._links: list[connection.Connection] = []
        self._processes: list[Any] = []
        self._logs = [logs / f"engine-{rank}.log" for rank in range(len(settings))]
        logs.mkdir(parents=True, exist_ok=True)
        try:
            for chosen, log in zip(settings, self._logs, strict=True):
                mine, theirs = context.Pipe()
                process = context.Process(target=_run, args=(serve, theirs, chosen, str(log)))
                process.start()
                theirs.close()
                self._links.append(mine)
                self._processes.append(process)
        except BaseException:
            self.end(0)
            raise

    def ask(self, messages: Sequence[Any], limit_s: float) -> list[Any]:
        """Sends each its message; see ``answers``."""
        for rank, message in enumerate(messages):
            try:
                self._links[rank].send(message)
            except OSError as error:  # a closed pipe
                raise EngineError(f"engine {rank} has ended: {self._words(rank)}") from error
        return self.answers(limit_s)

    def answers(self, limit_s: float) -> list[Any]:
        """One of each engine. ``EngineError`` as soon as one has failed or ended, or after ``limit_s``."""
        try:
            return self._answers(limit_s)
        except EngineError:
            for process in self._processes:  # one that hangs, or that another waits for, says where
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGUSR1)
            time.sleep(_STACKS_S)
            raise

    def _answers(self, limit_s: float) -> list[Any]:
        end = time.monotonic() + limit_s
        found: dict[int, Any] = {}
        while missing := [rank for rank in range(len(self._links)) if rank not in found]:
            watched: list[Any] = [self._links[rank] for rank in missing]
            watched += [self._processes[rank].sentinel for rank in missing]  # its children may hold the pipe open
            if not connection.wait(watched, max(0.0, end - time.monotonic())):
                words = "; ".join(self._words(rank) for rank in missing)
                raise EngineError(f"no answer of engines {missing} in {limit_s:.0f} s: {words}")
            for rank in missing:
                if not self._links[rank].poll():
                    if self._processes[rank].exitcode is not None and not self._links[rank].poll():
                        raise self._ended(rank)
                    continue
                try:
                    kind, value = self._links[rank].recv()
                except (EOFError, OSError) as error:
                    raise self._ended(rank) from error
                if kind != "ok":
                    first = " ".join(str(value).split())[:400]
                    raise EngineError(f"engine {rank}: {first}; its log: {self._words(rank)}")
                found[rank] = value
        return [found[rank] for rank in range(len(self._links))]

    def end(self, grace_s: float) -> None:
        """Those that do not end by themselves are terminated, then killed, and in any case all that they started.

        Returns once they are gone, so that the next engines find the memory free.
        """
        for link in self._links:
            link.close()
        until = time.monotonic() + grace_s
        # Sentinels do not reap: the process keeps its number, which is its session's, until that is killed.
        sentinels = {process.sentinel for process in self._processes}
        while sentinels and (left := until - time.monotonic()) > 0:
            sentinels -= set(connection.wait(list(sentinels), left))
        for number, limit_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _GONE_S)):
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):  # one that has not yet begun its session
                    os.killpg(process.pid, number)
                if number == signal.SIGKILL:
                    process.kill()
            left_over = _wait_until_gone({process.pid for process in self._processes}, limit_s)
        for process in self._processes:
            process.join(1)
        self._links, self._processes = [], []
        if left_over:
            raise EngineError(f"processes {left_over} were killed and are still there after {_GONE_S:.0f} s")

    def _ended(self, rank: int) -> EngineError:
        self._processes[rank].join(1)
        code = self._processes[rank].exitcode
        return EngineError(f"engine {rank} ended with exit code {code}: {self._words(rank)}")

    def _words(self, rank: int) -> str:
        """The first error in its log, which others follow from, and the last line."""
        log = self._logs[rank]
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()] if log.exists() else []
        lines = [line for line in lines if line]
        errors = [line for line in lines if _ERROR.search(line) and not _NO_ERROR.search(line)]
        chosen = list(dict.fromkeys([*errors[:1], *lines[-1:]]))
        return " | ".join(line[:300] for line in chosen) or "(it wrote nothing)"


def _wait_until_gone(groups: set[int], limit_s: float) -> list[int]:
    """Processes of these groups that are still there after ``limit_s``."""
    until = time.monotonic() + limit_s
    while (left := _members(groups)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _members(groups: set[int]) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def _run(serve: Serve, link: Any, settings: dict[str, Any], log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1)  # also in processes that are forked from here
    try:
        serve(link, settings)
    except (EOFError, BrokenPipeError):
        pass  # the bench has gone
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            link.send(("error", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
