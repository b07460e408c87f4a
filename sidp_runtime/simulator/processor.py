"""A rank's compute: one piece of work at a time, requests of other ranks ahead of its own."""

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
    """Runs work to its end, in order of arrival; while the rank's ports are busy it takes ``slowdown`` times as long.

    What runs is not interrupted: a request waits for the layer that its owner is computing, no longer.
    """

    def __init__(self, engine: Engine, slowdown: float) -> None:
        self._engine = engine
        self._slowdown = slowdown
        self._factor = 1.0
        self._own: deque[Work] = deque()
        self._requests: deque[Work] = deque()
        self._running: Work | None = None
        self._left_ms = 0.0
        self._since_ms = 0.0
        self._timer: Timer | None = None
        self._stopped = False

    def submit(self, work: Work, *, request: bool = False) -> None:
        if not self._stopped:
            (self._requests if request else self._own).append(work)
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
        self._own.clear()
        self._requests.clear()
        self._running = None
        if self._timer is not None:
            self._timer.cancel()

    def _next(self) -> None:
        if self._running is None and (self._requests or self._own):
            self._running = (self._requests or self._own).popleft()
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
