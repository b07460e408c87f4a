"""The queue of batches: who has which, and what is left. Pure bookkeeping, no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..errors import UsageError


class BatchQueue:
    """Hands out whole batches by number; each is done exactly once, whatever dies in between.

    A replica has at most ``most_held`` at a time, so the fast take more. A batch that comes back is given out next, as
    it was: its composition never changes.
    """

    def __init__(self, batches: Iterable[int], most_held: int = 1) -> None:
        self._most_held = most_held
        self._pending = deque(batches)
        self._total = len(self._pending)
        if len(set(self._pending)) != self._total:
            raise UsageError(f"{self._total} batches were given, {len(set(self._pending))} of them different")
        self._in_flight: dict[int, int] = {}  # batch -> replica
        self._done: set[int] = set()
        self._failures: dict[int, int] = {}

    def take(self, replica: int) -> int | None:
        """The next batch for a replica that can hold one more; None when nothing is pending. ``UsageError`` if not."""
        if not self.has_room(replica):
            raise UsageError(f"replica {replica} still has {self.held_by(replica)}", rank=replica)
        if not self._pending:
            return None
        batch = self._pending.popleft()
        self._in_flight[batch] = replica
        return batch

    def done(self, batch: int) -> int:
        """The batch has its result; returns who had it. ``UsageError`` if nobody has it."""
        if batch not in self._in_flight:
            raise UsageError(f"batch {batch} is done but in nobody's hands")
        self._done.add(batch)
        return self._in_flight.pop(batch)

    def fail(self, replica: int) -> list[int]:
        """The replica is gone; the batches it had, which are now first in the queue, in the order they were taken."""
        batches = self.held_by(replica)
        for batch in batches:
            del self._in_flight[batch]
            self._failures[batch] = self._failures.get(batch, 0) + 1
        self._pending.extendleft(reversed(batches))
        return batches

    def held_by(self, replica: int) -> list[int]:
        """The batches that the replica has, in the order they were taken."""
        return [batch for batch, holder in self._in_flight.items() if holder == replica]

    def has_room(self, replica: int) -> bool:
        """Whether it may take another."""
        return len(self.held_by(replica)) < self._most_held

    def failures(self, batch: int) -> int:
        """How many replicas went down with this batch in their hands."""
        return self._failures.get(batch, 0)

    @property
    def finished(self) -> bool:
        return len(self._done) == self._total

    @property
    def num_total(self) -> int:
        return self._total

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_done(self) -> int:
        return len(self._done)
