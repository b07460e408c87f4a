"""The clock of the simulation: callbacks in order of time, then in order of arrival. Times are ms."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """One callback that is due; ``cancel()`` drops it."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Engine:
    """A heap of timers. ``settlers`` run once all that happens at one instant has happened, before time moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.settlers: list[Callable[[], None]] = []
        self._heap: list[tuple[float, int, Timer]] = []
        self._sequence = 0

    def at(self, time_ms: float, callback: Callable[[], None]) -> Timer:
        """Calls back at ``time_ms``, not before now. Equal times keep the order in which they were asked for."""
        timer = Timer(callback)
        heapq.heappush(self._heap, (max(time_ms, self.now), self._sequence, timer))
        self._sequence += 1
        return timer

    def after(self, delay_ms: float, callback: Callable[[], None]) -> Timer:
        return self.at(self.now + delay_ms, callback)

    def run(self) -> None:
        """Until nothing is due."""
        while True:
            if not self._heap or self._heap[0][0] > self.now:
                for settle in self.settlers:
                    settle()
            if not self._heap:
                return
            self.now, _, timer = heapq.heappop(self._heap)
            if timer.callback is not None:
                timer.callback()
