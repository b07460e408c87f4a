"""The links: each rank has one egress and one ingress port, and flows share them max-min fairly.

A flow's rate is found by water-filling: the port with the smallest capacity per flow gives each of its flows that
share, what they take is subtracted from their other ports, and so on. The fabric between the ports never limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .engine import Engine, Timer

BYTES_PER_MS = 1e6  # of 1 GB/s


class Flow:
    """Bytes on their way from ``source`` to ``target``; ``rate`` in bytes/ms."""

    __slots__ = ("done", "num_bytes", "rate", "remaining", "settled_ms", "source", "target", "timer")

    def __init__(self, source: int, target: int, num_bytes: float, done: Callable[[], None]) -> None:
        self.source = source
        self.target = target
        self.num_bytes = num_bytes
        self.done = done
        self.remaining = num_bytes
        self.rate = 0.0
        self.settled_ms = 0.0
        self.timer: Timer | None = None


class Network:
    """``changed(rank)`` is called when a rank's ports become busy or idle. Ports: rank, then world_size + rank."""

    def __init__(
        self,
        engine: Engine,
        world_size: int,
        egress_gbps: float,
        ingress_gbps: float,
        changed: Callable[[int], None],
    ) -> None:
        self._engine = engine
        self._world_size = world_size
        self._capacity = [egress_gbps * BYTES_PER_MS] * world_size + [ingress_gbps * BYTES_PER_MS] * world_size
        self._flows: list[dict[Flow, None]] = [{} for _ in range(2 * world_size)]  # a dict keeps order: runs repeat
        self._dirty: dict[int, None] = {}
        self._changed = changed
        self.moved = [[0.0] * world_size for _ in range(world_size)]  # bytes by [target][source]
        engine.settlers.append(self._settle)

    def busy(self, rank: int) -> bool:
        return bool(self._flows[rank] or self._flows[self._world_size + rank])

    def start(self, source: int, target: int, num_bytes: float, done: Callable[[], None]) -> Flow:
        flow = Flow(source, target, num_bytes, done)
        flow.settled_ms = self._engine.now
        were_busy = self.busy(source), self.busy(target)
        for port in self._ports(flow):
            self._flows[port][flow] = None
            self._dirty[port] = None
        self._tell(flow, were_busy)
        return flow

    def cancel(self, flow: Flow) -> None:
        """The bytes that did not arrive never will; those that did count as moved."""
        if flow in self._flows[flow.source]:
            self._take_out(flow, flow.num_bytes - self._left(flow))

    def _ports(self, flow: Flow) -> tuple[int, int]:
        return flow.source, self._world_size + flow.target

    def _tell(self, flow: Flow, were_busy: tuple[bool, bool]) -> None:
        for rank, was_busy in zip((flow.source, flow.target), were_busy, strict=True):
            if self.busy(rank) != was_busy:
                self._changed(rank)

    def _take_out(self, flow: Flow, num_bytes: float) -> None:
        were_busy = self.busy(flow.source), self.busy(flow.target)
        for port in self._ports(flow):
            del self._flows[port][flow]
            self._dirty[port] = None
        if flow.timer is not None:
            flow.timer.cancel()
        self.moved[flow.target][flow.source] += num_bytes
        self._tell(flow, were_busy)

    def _finish(self, flow: Flow) -> None:
        self._take_out(flow, flow.num_bytes)
        flow.done()

    def _left(self, flow: Flow) -> float:
        return max(0.0, flow.remaining - flow.rate * (self._engine.now - flow.settled_ms))

    def _settle(self) -> None:
        """New rates for every flow that is connected, through shared ports, with a port that changed."""
        if not self._dirty:
            return
        ports = self._dirty
        queue = list(ports)
        while queue:
            for flow in self._flows[queue.pop()]:
                for port in self._ports(flow):
                    if port not in ports:
                        ports[port] = None
                        queue.append(port)
        self._dirty = {}
        for flow, rate in self._fair_rates(list(ports)).items():
            if rate != flow.rate:
                flow.remaining = self._left(flow)
                flow.settled_ms = self._engine.now
                flow.rate = rate
                if flow.timer is not None:
                    flow.timer.cancel()
                flow.timer = self._engine.after(flow.remaining / rate, partial(self._finish, flow))

    def _fair_rates(self, ports: list[int]) -> dict[Flow, float]:
        waiting = {port: len(self._flows[port]) for port in ports if self._flows[port]}
        capacity = {port: self._capacity[port] for port in waiting}
        rates: dict[Flow, float] = {}
        while waiting:
            tightest = min(waiting, key=lambda port: capacity[port] / waiting[port])
            share = capacity[tightest] / waiting[tightest]
            for flow in self._flows[tightest]:
                if flow in rates:
                    continue
                rates[flow] = share
                for port in self._ports(flow):
                    capacity[port] = max(0.0, capacity[port] - share)
                    waiting[port] -= 1
            waiting = {port: count for port, count in waiting.items() if count}
        return rates
