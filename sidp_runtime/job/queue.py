"""The queue of batches: who has which, and what is left. Pure bookkeeping, no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ..errors import UsageError


class BatchQueue:
    """Hands out whole batches by number; each is done exactly once, whatever dies in between.

    A replica has at most one batch at a time, so the fast take more. A batch that comes back is given out next, as
    it was: its composition never changes.
    """

    def __init__(self, batches: Iterable[int]) -> None:
        self._pending = deque(batches)
        self._total = len(self._pending)
        if len(set(self._pending)) != self._total:
            raise UsageError(f"{self._total} batches were given, {len(set(self._pending))} of them different")
        self._in_flight: dict[int, int] = {}  # replica -> batch
        self._done: set[int] = set()
        self._failures: dict[int, int] = {}

    def take(self, replica: int) -> int | None:
        """The next batch for an idle replica; None when nothing is pending. ``UsageError`` if it has one already."""
        if replica in self._in_flight:
            raise UsageError(f"replica {replica} still has batch {self._in_flight[replica]}", rank=replica)
        if not self._pending:
            return None
        batch = self._in_flight[replica] = self._pending.popleft()
        return batch

    def done(self, batch: int) -> int:
        """The batch has its result; returns who had it. ``UsageError`` if nobody has it."""
        for replica, held in self._in_flight.items():
            if held == batch:
                del self._in_flight[replica]
                self._done.add(batch)
                return replica
        raise UsageError(f"batch {batch} is done but in nobody's hands")

    def fail(self, replica: int) -> int | None:
        """The replica is gone; the batch it had, which is now first in the queue, or None."""
        batch = self._in_flight.pop(replica, None)
        if batch is not None:
            self._pending.appendleft(batch)
            self._failures[batch] = self._failures.get(batch, 0) + 1
        return batch

    def held_by(self, replica: int) -> int | None:
        """The batch that the replica has."""
        return self._in_flight.get(replica)

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
