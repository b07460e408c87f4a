"""Whose copy an owner's link carries. Exclusive links carry one lane's at a time, chosen as the runtime chooses.

They gate lanes alone. Rows of requests, and copies of a dead owner's layers in CaS, flow beside the copy that runs and
share the ports with it, max-min fairly: they are small, or rare, and the runtime asks nobody for them.
"""

from __future__ import annotations

from collections.abc import Callable

from ..placement import next_reader
from .engine import Engine


class Links:
    """A reader asks before each copy and lets go after it. A link that is free is had at once, and none is taken away.

    All that is asked for and let go at one instant is there before anybody is chosen: which of them was first says
    nothing, but replicas that move in step would keep that order for ever.
    """

    def __init__(self, engine: Engine, world_size: int, exclusive: bool) -> None:
        self._world_size = world_size
        self._exclusive = exclusive and world_size > 2  # of two, each owner has one reader
        self._reader: list[int | None] = [None] * world_size  # by owner
        self._last = list(range(world_size))  # whom each served last, at first itself
        self._waiting: list[dict[int, Callable[[], None]]] = [{} for _ in range(world_size)]
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
            self._changed[owner] = None

    def _settle(self) -> None:
        changed, self._changed = self._changed, {}
        for owner in changed:
            if self._reader[owner] is not None:
                continue
            waiting = self._waiting[owner]
            chosen = next_reader(self._last[owner], self._world_size, list(waiting))
            if chosen >= 0:
                self._reader[owner] = self._last[owner] = chosen
                waiting.pop(chosen)()
