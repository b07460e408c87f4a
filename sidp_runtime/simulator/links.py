"""Whose copy an owner's link carries. Exclusive links carry one lane's at a time, chosen as the runtime chooses.

They gate lanes alone. Rows of requests, and copies of a dead owner's layers in CaS, flow beside the copy that runs and
share the ports with it, max-min fairly: they are small, or rare, and the runtime asks nobody for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .._C import LINK_GRACE_SHARE
from ..placement import next_reader
from .engine import Engine


class Links:
    """A reader asks before each copy and lets go after it. None is taken away.

    A free link is left for a moment, 1 / ``LINK_GRACE_SHARE`` of the copy before (in the runtime: of the reader's own
    last one): which of those that come together was first says nothing, but replicas that move in step would keep that
    order for ever.
    """

    def __init__(self, engine: Engine, world_size: int, exclusive: bool) -> None:
        self._engine = engine
        self._world_size = world_size
        self._exclusive = exclusive and world_size > 2  # of two, each owner has one reader
        self._reader: list[int | None] = [None] * world_size  # by owner
        self._last = list(range(world_size))  # whom each served last, at first itself
        self._waiting: list[dict[int, Callable[[], None]]] = [{} for _ in range(world_size)]
        self._since_ms = [0.0] * world_size
        self._grace_ms = [0.0] * world_size
        self._left: set[int] = set()  # owners whose link is being left for its moment
        self._due: set[int] = set()  # and those for which that is over
        self._changed: dict[int, None] = {}
        engine.settlers.append(self._settle)

    def ask(self, owner: int, reader: int, begin: Callable[[], None]) -> None:
        """``begin`` is called when the link is the reader's."""
        if self._exclusive:
            self._waiting[owner][reader] = begin
            self._changed[owner] = None
        else:
            begin()

    def let_go(self, owner: int, reader: int) -> None:
        """The reader's copy has ended, or the reader died, be it served or still waiting."""
        self._waiting[owner].pop(reader, None)
        if self._reader[owner] == reader:
            self._reader[owner] = None
            self._grace_ms[owner] = (self._engine.now - self._since_ms[owner]) / LINK_GRACE_SHARE
            self._changed[owner] = None

    def _settle(self) -> None:
        changed, self._changed = self._changed, {}
        for owner in changed:
            waiting = self._waiting[owner]
            if self._reader[owner] is not None or not waiting:
                self._due.discard(owner)
            elif owner in self._due:
                self._due.discard(owner)
                chosen = next_reader(self._last[owner], self._world_size, list(waiting))
                self._reader[owner] = self._last[owner] = chosen
                self._since_ms[owner] = self._engine.now
                waiting.pop(chosen)()
            elif owner not in self._left:
                self._left.add(owner)
                self._engine.after(self._grace_ms[owner], partial(self._over, owner))

    def _over(self, owner: int) -> None:
        self._left.discard(owner)
        self._due.add(owner)
        self._changed[owner] = None
