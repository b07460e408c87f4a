"""One replica: walks the layers in order, step by step, in WaS or CaS mode."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .._C import Mode
from ..placement import Placement
from .config import SimulationConfig
from .engine import Engine
from .lane import Lane
from .links import Links
from .network import Flow, Network
from .processor import Processor, Work
from .result import Recorder, ReplicaResult, SpanKind, StepResult


class Replica:
    """``peers``: all replicas by rank, this one included; filled in by the caller before ``begin``."""

    def __init__(
        self,
        config: SimulationConfig,
        placement: Placement,
        rank: int,
        engine: Engine,
        links: Links,
        network: Network,
        recorder: Recorder,
        peers: list[Replica],
    ) -> None:
        self._config = config
        self._rank = rank
        self._engine = engine
        self._network = network
        self._recorder = recorder
        self._peers = peers
        self._random = Random(f"{config.seed}/{rank}")  # one stream a rank: a rank's draws do not move another's
        self._owners = [placement.owner(layer) for layer in range(placement.num_layers)]
        self.processor = Processor(engine, config.overlap_slowdown)
        self._lane = Lane(
            config, placement.ring_plan(rank), rank, self._owners, engine, links, network, recorder, self._arrived
        )
        self._is_was = config.mode_of(rank) == Mode.WAS
        self._use = 0  # streamed layers consumed so far
        self._wanted: int | None = None  # the copy that the step waits for
        self._step = 0
        self._layer = 0
        self._step_start_ms = 0.0
        self._asked_ms = 0.0
        self._wait_ms = 0.0
        self._steps: list[StepResult] = []
        self._served = 0
        self._fallback: Flow | None = None
        self._dead = False

    def begin(self) -> None:
        self._engine.at(self._config.start_of(self._rank), self._gap)
        if self._rank in self._config.dead_ms:
            self._engine.at(self._config.dead_ms[self._rank], self._die)

    def result(self) -> ReplicaResult:
        return ReplicaResult(
            rank=self._rank,
            steps=tuple(self._steps),
            bytes_by_peer=tuple(self._network.moved[self._rank]),
            requests_served=self._served,
            last_copy_ms=self._lane.last_copy_ms,
            died_ms=self._config.dead_ms.get(self._rank) if self._dead else None,
        )

    def _die(self) -> None:
        """Computes and copies nothing from now on. Its egress stays: memory outlives its process."""
        self._dead = True
        self.processor.stop()
        self._lane.stop()
        if self._fallback is not None:
            self._network.cancel(self._fallback)

    def _gap(self) -> None:
        self._engine.after(self._random.uniform(0, self._config.gap_ms), self._begin_step)

    def _begin_step(self) -> None:
        if self._dead:
            return
        self._step_start_ms = self._engine.now
        self._wait_ms = 0.0
        self._layer = 0
        if self._is_was or (self._config.refill and self._step == 0):
            self._lane.begin_step(self._step)
        self._next_layer()

    def _next_layer(self) -> None:
        if self._dead:
            return
        if self._layer == len(self._owners):
            self._end_step()
            return
        owner = self._owners[self._layer]
        self._asked_ms = self._engine.now
        if owner in (-1, self._rank):
            self._compute(self._finish_layer)
        elif self._is_was:
            self._wanted = self._use
            if self._lane.is_ready(self._use):
                self._arrived(self._use)
        else:
            self._request(owner)

    def _arrived(self, copy: int) -> None:
        if copy == self._wanted:
            self._wanted = None
            self._waited("wait")
            self._compute(self._release)

    def _waited(self, kind: SpanKind) -> None:
        self._wait_ms += self._engine.now - self._asked_ms
        self._recorder.span(self._rank, kind, self._step, self._layer, self._owners[self._layer], self._asked_ms)

    def _release(self) -> None:
        self._lane.release(self._use)
        self._use += 1
        self._finish_layer()

    def _finish_layer(self) -> None:
        self._layer += 1
        self._next_layer()

    def _end_step(self) -> None:
        self._steps.append(StepResult(self._step, self._step_start_ms, self._engine.now, self._wait_ms))
        self._step += 1
        if self._step < self._config.num_steps:
            self._gap()

    def _work_ms(self, rows: int) -> float:
        spread = self._config.jitter
        return self._config.compute_ms(self._layer, rows) * self._random.uniform(1 - spread, 1 + spread)

    def _compute(self, then: Callable[[], None]) -> None:
        """This rank's own compute of the layer; time spent behind requests counts as waiting."""
        submitted_ms = begun_ms = self._engine.now

        def started() -> None:
            nonlocal begun_ms
            begun_ms = self._engine.now
            self._wait_ms += begun_ms - submitted_ms

        def done() -> None:
            owner = self._owners[self._layer]
            peer = self._rank if owner < 0 else owner
            self._recorder.span(self._rank, "compute", self._step, self._layer, peer, begun_ms)
            then()

        self.processor.submit(Work(self._work_ms(self._config.rows_of(self._rank)), started, done))

    def _request(self, owner: int) -> None:
        """Rows to the owner, rows back; a layer of its own copying once the owner is known to be dead."""
        rows = self._config.rows_of(self._rank)
        key = (self._step, self._layer)
        open_request = [True]

        def send(source: int, target: int, then: Callable[[], None]) -> None:
            num_bytes = rows * self._config.row_bytes
            half_ms = self._config.round_trip_us * 0.5e-3

            def start() -> None:
                if num_bytes:
                    self._network.start(source, target, num_bytes, then)
                else:
                    then()

            self._engine.after(half_ms, start)

        def replied() -> None:
            if open_request[0] and not self._dead:
                open_request[0] = False
                self._waited("request")
                self._finish_layer()

        def give_up() -> None:
            if open_request[0] and not self._dead:
                open_request[0] = False
                self._engine.after(self._config.copy_latency_us * 1e-3, lambda: self._copy_from(owner))

        dies_ms = self._config.dead_ms.get(owner)
        given_up_ms = None if dies_ms is None else dies_ms + self._config.detection_ms
        if given_up_ms is not None and self._engine.now >= given_up_ms:
            give_up()
            return
        work_ms = self._work_ms(rows)
        send(
            self._rank,
            owner,
            lambda: self._peers[owner].serve(self._rank, *key, work_ms, lambda: send(owner, self._rank, replied)),
        )
        if given_up_ms is not None:
            self._engine.at(given_up_ms, give_up)

    def serve(self, requester: int, step: int, layer: int, work_ms: float, reply: Callable[[], None]) -> None:
        """A request has arrived at this owner."""
        begun_ms = self._engine.now

        def started() -> None:
            nonlocal begun_ms
            begun_ms = self._engine.now

        def done() -> None:
            self._served += 1
            self._recorder.span(self._rank, "serve", step, layer, requester, begun_ms)
            reply()

        self.processor.submit(Work(work_ms, started, done))

    def _copy_from(self, owner: int) -> None:
        """The layer of a dead owner, copied when it is needed and not ahead of it."""

        def landed() -> None:
            self._fallback = None
            self._waited("wait")
            self._compute(self._finish_layer)

        if not self._dead:
            num_bytes = self._config.layer_bytes[self._layer]
            self._fallback = self._network.start(owner, self._rank, num_bytes, landed)
