"""A rank's compute: one piece of work at a time, its own layers and requests of other ranks in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .engine import Engine, Timer


@dataclass
class Work:
    """``work_ms`` of compute at full speed. ``started`` and ``done`` are called when it begins and ends."""

    work_ms: float
    started: Callable[[], None]
    done: Callable[[], None]


class Processor:
    """Runs work to its end, in order of arrival; while its ports are busy it takes ``slowdown`` times as long."""

    def __init__(self, engine: Engine, slowdown: float) -> None:
        self._engine = engine
        self._slowdown = slowdown
        self._factor = 1.0
        self._queue: deque[Work] = deque()
        self._running: Work | None = None
        self._left_ms = 0.0
        self._since_ms = 0.0
        self._timer: Timer | None = None
        self._stopped = False

    def submit(self, work: Work) -> None:
        if not self._stopped:
            self._queue.append(work)
            self._next()

    def set_copying(self, copying: bool) -> None:
        factor = self._slowdown if copying else 1.0
        if factor == self._factor:
            return
        if self._running is not None:
            self._left_ms = max(0.0, self._left_ms - (self._engine.now - self._since_ms) / self._factor)
        self._factor = factor
        if self._running is not None:
            self._schedule()

    def stop(self) -> None:
        self._stopped = True
        self._queue.clear()
        self._running = None
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        if self._running is None and self._queue:
            self._running = self._queue.popleft()
            self._left_ms = self._running.work_ms
            self._running.started()
            self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._since_ms = self._engine.now
        self._timer = self._engine.after(self._left_ms * self._factor, self._finish)

    def _finish(self) -> None:
        work, self._running = self._running, None
        assert work is not None
        work.done()
        self._next()
