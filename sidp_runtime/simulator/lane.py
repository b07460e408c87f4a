"""A rank's lane: copies the streamed layers into the ring in a fixed order, each once its slot is empty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..placement import RingEntry
from .config import SimulationConfig
from .engine import Engine
from .links import Links
from .network import Flow, Network
from .result import Recorder


@dataclass(frozen=True)
class Piece:
    """Slice of copy number ``copy``, counted from the first streamed layer of the first step."""

    copy: int
    num_bytes: int
    is_first: bool
    is_last: bool


class Lane:
    """One copy at a time, and it asks for its owner's link first; so does each slice.

    Uses and copies count alike: use ``k`` consumes copy ``k``.
    """

    def __init__(
        self,
        config: SimulationConfig,
        plan: list[RingEntry],
        rank: int,
        owners: list[int],
        engine: Engine,
        links: Links,
        network: Network,
        recorder: Recorder,
        arrived: Callable[[int], None],
    ) -> None:
        self._config = config
        self._plan = plan
        self._rank = rank
        self._owners = owners
        self._engine = engine
        self._links = links
        self._network = network
        self._recorder = recorder
        self._arrived = arrived
        warm = min(config.warm_slots, len({entry.slot for entry in plan}))
        self._full = [False] * (1 + max((entry.slot for entry in plan), default=0))
        for copy in range(warm):
            self._full[self.entry(copy).slot] = True
        self._ready = set(range(warm))
        self._begun = warm  # copies that were planned into pieces
        self._end = config.num_steps * len(plan) + warm if config.refill else 0
        self._pieces: list[Piece] = []  # of the current group, last first
        self._flow: Flow | None = None
        self._asked: int | None = None  # the owner whose link this rank has or waits for
        self._stopped = False
        self.last_copy_ms = 0.0

    def entry(self, copy: int) -> RingEntry:
        return self._plan[copy % len(self._plan)]

    def is_ready(self, copy: int) -> bool:
        return copy in self._ready

    def release(self, copy: int) -> None:
        """The consumer is done with a copy: its slot is empty."""
        self._ready.discard(copy)
        self._full[self.entry(copy).slot] = False
        self._pump()

    def begin_step(self, step: int) -> None:
        """Copies of this step may start; with ``refill`` they could since slots were empty."""
        if not self._config.refill:
            self._end = (step + 1) * len(self._plan)
        self._pump()

    def stop(self) -> None:
        self._stopped = True
        if self._flow is not None:
            self._network.cancel(self._flow)
        if self._asked is not None:
            self._links.let_go(self._asked, self._rank)

    def _next_group(self) -> None:
        """Pieces of the next copies: slice by slice over owners that start after this rank when ``rotate`` is set."""
        copies: list[int] = []
        slots: set[int] = set()
        # Two copies into one slot must not share a group: the second would wait for a slice queued behind it.
        while len(copies) < self._config.slice_group and self._begun < self._end:
            slot = self.entry(self._begun).slot
            if slot in slots:
                break
            slots.add(slot)
            copies.append(self._begun)
            self._begun += 1
        if self._config.rotate:
            world_size = self._config.world_size
            copies.sort(key=lambda copy: (self._owners[self.entry(copy).layer] - self._rank - 1) % world_size)
        count = self._config.slices
        for part in range(count):
            for copy in copies:
                size = self.entry(copy).bytes
                num_bytes = size * (part + 1) // count - size * part // count
                self._pieces.append(Piece(copy, num_bytes, part == 0, part == count - 1))
        self._pieces.reverse()

    def _pump(self) -> None:
        if self._asked is not None or self._stopped:
            return
        if not self._pieces:
            self._next_group()
        if not self._pieces:
            return
        piece = self._pieces[-1]
        entry = self.entry(piece.copy)
        if piece.is_first:
            if self._full[entry.slot]:
                return
            self._full[entry.slot] = True
        self._pieces.pop()
        self._asked = self._owners[entry.layer]
        self._links.ask(self._asked, self._rank, lambda: self._begin(piece, entry))

    def _begin(self, piece: Piece, entry: RingEntry) -> None:
        start_ms = self._engine.now
        self._engine.after(self._config.copy_latency_us * 1e-3, lambda: self._send(piece, entry, start_ms))

    def _send(self, piece: Piece, entry: RingEntry, start_ms: float) -> None:
        if self._stopped:
            return
        owner = self._owners[entry.layer]
        self._flow = self._network.start(
            owner, self._rank, piece.num_bytes, lambda: self._landed(piece, entry, start_ms)
        )

    def _landed(self, piece: Piece, entry: RingEntry, start_ms: float) -> None:
        owner = self._owners[entry.layer]
        self._flow = None
        self._asked = None
        self._links.let_go(owner, self._rank)
        self.last_copy_ms = self._engine.now
        step = piece.copy // len(self._plan)
        self._recorder.span(self._rank, "copy", step, entry.layer, owner, start_ms)
        if piece.is_last:
            self._ready.add(piece.copy)
            self._arrived(piece.copy)
        self._pump()
