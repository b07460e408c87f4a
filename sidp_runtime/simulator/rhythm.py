"""Two replicas in CaS with attention between the ops of a layer: what each remote layer adds to a step.

python -m sidp_runtime.simulator.rhythm  # by resident layers and where they lie, as docs/simulator.md has it

What runs on a GPU shares it evenly. Turns are as in csrc/DESIGN.md: a request waits while its owner computes a layer of
its own, but for one that goes on with a begun layer, and for ``patience_us`` at most; an engine waits for the request
that its GPU computes. Two replicas lose no time if both are in remote layers at once, and else in layers of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from statistics import median

from ..errors import ConfigError
from ..placement import Placement, choose_resident_layers
from .engine import Engine, Timer

Then = Callable[[], None]
RESIDENT = -1
_SEEN_US = 1.5  # until a service's thread sees that a turn has ended


@dataclass(frozen=True)
class Rhythm:
    """Times are us, alone on a GPU; by default those of a decode step of Qwen3-32B on an H200.

    ``owners``: of each layer 0, 1 or ``RESIDENT``. ``ops_us``: input projections, output projection, MLP; attention of
    each replica lies between the first two. ``gap_us`` of host time and ``head_us`` of compute follow the layers.
    ``offset_us``: replica 1 starts later by it.
    """

    owners: tuple[int, ...]
    attention_us: tuple[float, float] = (115.0, 115.0)
    ops_us: tuple[float, float, float] = (56.0, 36.0, 184.0)
    round_trip_us: float = 20.0
    gap_us: float = 2000.0
    head_us: float = 600.0
    patience_us: float = 600.0
    jitter: float = 0.1
    num_steps: int = 12
    offset_us: float = 0.0
    begun_first: bool = True
    seed: int = 0


def remote_layer_us(rhythm: Rhythm) -> float:
    """What a remote layer adds to a step of plain data parallelism, mean over steps, of the replica that loses more.

    Only of one that has remote layers; ``ConfigError`` if neither has.
    """
    remote = [sum(owner == 1 - rank for owner in rhythm.owners) for rank in (0, 1)]
    if not any(remote):
        raise ConfigError("no layer is remote")
    layers_us = [len(rhythm.owners) * (sum(rhythm.ops_us) + rhythm.attention_us[rank]) for rank in (0, 1)]
    alone_us = [us * (1 + rhythm.jitter / 2) + rhythm.head_us + rhythm.gap_us for us in layers_us]
    steps_us = step_us(rhythm)
    return max((steps_us[rank] - alone_us[rank]) / remote[rank] for rank in (0, 1) if remote[rank])


def step_us(rhythm: Rhythm) -> tuple[float, float]:
    """Mean step of each replica while both run, the first three left out."""
    clock = Engine()
    gpus = (_Gpu(clock, rhythm), _Gpu(clock, rhythm))
    replicas = [_Replica(clock, rhythm, rank, gpus) for rank in (0, 1)]
    for replica, start_us in zip(replicas, (0.0, rhythm.offset_us), strict=True):
        clock.at(start_us, replica.next_layer)
    clock.run()
    both_until = min(replica.ends_us[-1] for replica in replicas)
    steps: list[float] = []
    for replica in replicas:
        ends = [end for end in replica.ends_us if end <= both_until]
        if len(ends) < 4:
            raise ConfigError(f"a replica made {len(ends)} of {rhythm.num_steps} steps while both ran; 4 are needed")
        steps.append((ends[-1] - ends[2]) / (len(ends) - 3))
    return steps[0], steps[1]


@dataclass
class _Request:
    work_us: float
    answered: Then
    begun: bool
    since_us: float


class _Gpu:
    """Shares its time among pieces of work. Serves requests one at a time, in order of arrival."""

    def __init__(self, clock: Engine, rhythm: Rhythm) -> None:
        self.in_turn = False
        self._clock, self._rhythm = clock, rhythm
        self._work: list[tuple[list[float], Then]] = []
        self._since_us = 0.0
        self._timer: Timer | None = None
        self._requests: deque[_Request] = deque()
        self._serving = False
        self._waiting: Then | None = None  # the engine's turn, for the end of a request

    def run(self, work_us: float, then: Then) -> None:
        self._settle()
        self._work.append(([work_us], then))
        self._schedule()

    def begin_turn(self, then: Then) -> None:
        self.in_turn = True
        if self._serving:
            self._waiting = then
        else:
            then()

    def end_turn(self) -> None:
        self.in_turn = False
        self._clock.after(_SEEN_US, self.serve)

    def ask(self, request: _Request) -> None:
        self._requests.append(request)
        self._clock.after(self._rhythm.patience_us + 0.01, self.serve)
        self.serve()

    def serve(self) -> None:
        if self._serving or not self._requests:
            return
        request = self._requests[0]
        waited_us = self._clock.now - request.since_us
        if self.in_turn and not (request.begun and self._rhythm.begun_first) and waited_us < self._rhythm.patience_us:
            return
        self._requests.popleft()
        self._serving = True

        def served() -> None:
            self._serving = False
            self._clock.after(self._rhythm.round_trip_us / 2, request.answered)
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                waiting()
            self.serve()

        self.run(request.work_us, served)

    def _settle(self) -> None:
        passed_us, self._since_us = self._clock.now - self._since_us, self._clock.now
        for left, _ in self._work:
            left[0] -= passed_us / len(self._work)

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._work:
            soonest = min(left[0] for left, _ in self._work)
            self._timer = self._clock.after(max(0.0, soonest) * len(self._work), self._finish)

    def _finish(self) -> None:
        self._settle()
        ended = min(self._work, key=lambda piece: piece[0][0])
        self._work.remove(ended)
        self._schedule()
        ended[1]()


class _Replica:
    """Walks its layers, step by step."""

    def __init__(self, clock: Engine, rhythm: Rhythm, rank: int, gpus: tuple[_Gpu, _Gpu]) -> None:
        self.ends_us: list[float] = []
        self._clock, self._rhythm, self._rank = clock, rhythm, rank
        self._own, self._peer = gpus[rank], gpus[1 - rank]
        self._random = Random(f"{rhythm.seed} {rank}")
        self._layer = 0

    def next_layer(self) -> None:
        rhythm = self._rhythm
        if self._layer == len(rhythm.owners):
            self._layer = 0
            self._own.run(rhythm.head_us, self._end_step)
            return
        owner = rhythm.owners[self._layer]
        self._layer += 1
        if owner == RESIDENT:
            self._compute(self.next_layer)
        elif owner == self._rank:
            self._own.begin_turn(lambda: self._compute(self._end_turn))
        else:
            self._request(0)

    def _end_step(self) -> None:
        self.ends_us.append(self._clock.now)
        if len(self.ends_us) < self._rhythm.num_steps:
            self._clock.after(self._rhythm.gap_us, self.next_layer)

    def _end_turn(self) -> None:
        self._own.end_turn()
        self.next_layer()

    def _attention(self, then: Then) -> None:
        self._own.run(self._varied(self._rhythm.attention_us[self._rank]), then)

    def _compute(self, then: Then) -> None:
        first, *rest = (self._varied(us) for us in self._rhythm.ops_us)
        self._own.run(first, lambda: self._attention(lambda: self._own.run(sum(rest), then)))

    def _request(self, op: int) -> None:
        def answered() -> None:
            if op == len(self._rhythm.ops_us) - 1:
                self.next_layer()
            elif op == 0:
                self._attention(lambda: self._request(1))
            else:
                self._request(op + 1)

        def arrived() -> None:
            work_us = self._varied(self._rhythm.ops_us[op])
            self._peer.ask(_Request(work_us, answered, op > 0, self._clock.now))

        self._clock.after(self._rhythm.round_trip_us / 2, arrived)

    def _varied(self, work_us: float) -> float:
        return work_us * (1 + self._rhythm.jitter * self._random.random())


_LAYERS = 64
_OFFSETS_US = (0.0, 150.0, 300.0, 450.0, 700.0, 1100.0, 5000.0, 9000.0)


def over_starts(resident: list[int], attention_us: tuple[float, float] = (115.0, 115.0)) -> list[float]:
    """``remote_layer_us`` for replicas that start apart by this or that."""
    placement = Placement.by_layer([1] * _LAYERS, 2, ring_slots=2, resident_layers=resident)
    owners = tuple(placement.owner(layer) for layer in range(_LAYERS))
    rhythms = (Rhythm(owners, attention_us, offset_us=offset, seed=seed) for seed, offset in enumerate(_OFFSETS_US))
    return [remote_layer_us(rhythm) for rhythm in rhythms]


def _compare() -> None:
    """As Markdown."""
    print(f"| resident of {_LAYERS} | attention, us a layer | at even distances | in runs |")
    print("| ---: | ---: | ---: | ---: |")
    for attention_us in ((115.0, 115.0), (300.0, 300.0), (105.0, 125.0), (90.0, 140.0)):
        for count in (0, 8, 20, 40, 48, 56, 62):
            cells = []
            for cas in (False, True):
                found = over_starts(choose_resident_layers(_LAYERS, count, 2, cas=cas), attention_us=attention_us)
                cells.append(f"{median(found):.0f} ({min(found):.0f} - {max(found):.0f})")
            both = " and ".join(f"{us:.0f}" for us in sorted(set(attention_us)))
            print(f"| {count} | {both} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    _compare()
