"""What is simulated: sizes, rates and times, all checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .._C import Mode
from ..errors import ConfigError
from ..placement import Placement

MAX_WORLD_SIZE = 72  # one NVLink domain

LayerTime = Callable[[int, int], float]


@dataclass(frozen=True)
class SimulationConfig:
    """Replicas that start with the ring ``warm_slots`` full and run ``num_steps`` steps each.

    Model: ``layer_bytes`` of each layer, placed by ``Placement.by_layer`` with ``ring_slots`` and ``resident_layers``.

    Compute: ``layer_ms`` of each layer, or a function of layer and rows; ``rows`` of each replica, or one for all.
    ``overlap_slowdown``: how much longer compute takes while bytes enter or leave the rank.

    Links: ``link_gbps`` (10^9 bytes/s) of a rank's egress and of its ingress, ``copy_latency_us`` before each copy's
    bytes flow. ``exclusive_links``: an owner's egress carries one lane's copy (or slice) at a time, as the runtime has
    it; else lanes share it, as hardware has it. With two ranks it is the same.

    Phases: ``start_ms`` of each rank (empty: all at 0), a random gap in [0, ``gap_ms``] ahead of each step, compute
    times a random factor in [1 - ``jitter``, 1 + ``jitter``], all from ``seed``.

    Lane: ``refill`` across step boundaries; each copy in ``slices``, interleaved over ``slice_group`` layers, each
    rank starting with the owner after it where ``rotate`` is set.

    CaS: ``mode`` of each rank or one for all; a row is ``row_bytes`` each way, an empty request and its reply take
    ``round_trip_us``. ``dead_ms``: rank to the time of its death; its memory outlives it, and requests that it leaves
    unanswered are given up ``detection_ms`` after the death.
    """

    world_size: int
    layer_bytes: tuple[int, ...]
    layer_ms: float | LayerTime
    link_gbps: float
    ring_slots: int = 2
    resident_layers: tuple[int, ...] = ()
    num_steps: int = 1
    rows: int | tuple[int, ...] = 1
    overlap_slowdown: float = 1.0
    copy_latency_us: float = 0.0
    exclusive_links: bool = True
    start_ms: tuple[float, ...] = ()
    gap_ms: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    warm_slots: int = 0
    refill: bool = True
    slices: int = 1
    slice_group: int = 1
    rotate: bool = False
    mode: Mode | tuple[Mode, ...] = Mode.WAS
    row_bytes: int = 0
    round_trip_us: float = 0.0
    dead_ms: dict[int, float] = field(default_factory=dict)
    detection_ms: float = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.world_size <= MAX_WORLD_SIZE:
            raise ConfigError(f"world_size is {self.world_size}, must be 2 to {MAX_WORLD_SIZE}")
        self._check_counts()
        self._check_numbers()
        if not self.refill and self.warm_slots:
            raise ConfigError(
                f"warm_slots is {self.warm_slots} without refill; a ring not refilled starts empty: use 0"
            )
        for name in ("rows", "mode", "start_ms"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.world_size and (value or name != "start_ms"):
                raise ConfigError(f"{name} has {len(value)} entries for {self.world_size} ranks; give one a rank")
        for rank, time_ms in self.dead_ms.items():
            if not 0 <= rank < self.world_size:
                raise ConfigError(f"dead rank {rank} is not one of 0 to {self.world_size - 1}", rank=rank)
            self._at_least(f"dead_ms of rank {rank}", time_ms, 0)
        self.placement()

    def _check_counts(self) -> None:
        for name, least in (("num_steps", 1), ("slices", 1), ("slice_group", 1), ("warm_slots", 0), ("row_bytes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name in ("warm_slots", "slice_group"):
            if getattr(self, name) > self.ring_slots:
                raise ConfigError(
                    f"{name} is {getattr(self, name)} with {self.ring_slots} ring_slots; lower it or add slots"
                )
        for rows in self.rows if isinstance(self.rows, tuple) else (self.rows,):
            if rows < 1:
                raise ConfigError(f"rows is {rows}, must be at least 1")

    def _check_numbers(self) -> None:
        if not (0 < self.link_gbps < math.inf):
            raise ConfigError(f"link_gbps is {self.link_gbps}, must be above 0")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter is {self.jitter}, must be in [0, 1)")
        # A measured product beside copies can be a hair faster than alone: below 1 is noise, not an error.
        if not 0.5 <= self.overlap_slowdown < math.inf:
            raise ConfigError(f"overlap_slowdown is {self.overlap_slowdown}, must be at least 0.5; 1 is no slowdown")
        for name in ("copy_latency_us", "gap_ms", "round_trip_us", "detection_ms"):
            self._at_least(name, getattr(self, name), 0)
        for rank, time_ms in enumerate(self.start_ms):
            self._at_least(f"start_ms of rank {rank}", time_ms, 0)
        if not callable(self.layer_ms):
            self._at_least("layer_ms", self.layer_ms, 0)

    @staticmethod
    def _at_least(name: str, value: float, least: float) -> None:
        if not (least <= value < math.inf):
            raise ConfigError(f"{name} is {value}, must be at least {least} and finite")

    def placement(self) -> Placement:
        """The runtime's own: simulator and runtime cannot disagree about owners, order and slots."""
        return Placement.by_layer(
            self.layer_bytes, self.world_size, ring_slots=self.ring_slots, resident_layers=self.resident_layers
        )

    def rows_of(self, rank: int) -> int:
        return self.rows[rank] if isinstance(self.rows, tuple) else self.rows

    def mode_of(self, rank: int) -> Mode:
        return self.mode[rank] if isinstance(self.mode, tuple) else self.mode

    def start_of(self, rank: int) -> float:
        return self.start_ms[rank] if self.start_ms else 0.0

    def compute_ms(self, layer: int, rows: int) -> float:
        """ms of compute of a layer, alone on its GPU. ConfigError where ``layer_ms`` returns no such number."""
        if not callable(self.layer_ms):
            return self.layer_ms
        value = self.layer_ms(layer, rows)
        self._at_least(f"layer_ms of layer {layer} and {rows} rows", value, 0)
        return value
