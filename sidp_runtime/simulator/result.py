"""What a simulation returns. Times are ms of the simulation's clock, which starts at 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .engine import Engine

SpanKind = Literal["compute", "copy", "wait", "serve", "request"]


@dataclass(frozen=True)
class Span:
    """A bar of a timeline. ``peer``: whose bytes or request it was; the rank itself for its own layers.

    "copy" is the rank's lane; "compute" and "serve" its compute; "wait" its step held up by a slot that is not full,
    "request" by a reply.
    """

    rank: int
    kind: SpanKind
    step: int
    layer: int
    peer: int
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class StepResult:
    """``wait_ms``: for slots to become full, for replies, and for the rank's own compute to be free of requests."""

    step: int
    start_ms: float
    end_ms: float
    wait_ms: float

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.start_ms


@dataclass(frozen=True)
class ReplicaResult:
    """``steps``: those that were finished. ``bytes_by_peer``: received from each rank, rows of CaS included.

    ``last_copy_ms``: when the lane was done, tail of the refill included. ``died_ms``: None for one that lived.
    """

    rank: int
    steps: tuple[StepResult, ...]
    bytes_by_peer: tuple[float, ...]
    requests_served: int
    last_copy_ms: float
    died_ms: float | None

    @property
    def step_ms(self) -> tuple[float, ...]:
        return tuple(step.duration_ms for step in self.steps)

    @property
    def wait_ms(self) -> float:
        return sum(step.wait_ms for step in self.steps)

    @property
    def total_ms(self) -> float:
        """From the first step's start to the end of the last step and of the copies."""
        return max(self.steps[-1].end_ms, self.last_copy_ms) - self.steps[0].start_ms if self.steps else 0.0


@dataclass(frozen=True)
class SimulationResult:
    """Utilisation: bytes over what the port could have carried in ``makespan_ms``, by rank.

    ``spans``: empty unless ``trace`` was set; in order of their ends.
    """

    replicas: tuple[ReplicaResult, ...]
    makespan_ms: float
    egress_utilisation: tuple[float, ...]
    ingress_utilisation: tuple[float, ...]
    spans: tuple[Span, ...]


class Recorder:
    """Collects spans that end now; spans of no length are left out."""

    def __init__(self, engine: Engine, trace: bool) -> None:
        self._engine = engine
        self._trace = trace
        self.spans: list[Span] = []

    def span(self, rank: int, kind: SpanKind, step: int, layer: int, peer: int, start_ms: float) -> None:
        if self._trace and self._engine.now > start_ms:
            self.spans.append(Span(rank, kind, step, layer, peer, start_ms, self._engine.now))
