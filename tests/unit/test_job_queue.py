"""BatchQueue: no batch is lost, doubled or recut, whatever the order of takes, results and deaths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidp_runtime.errors import UsageError
from sidp_runtime.job.queue import BatchQueue

pytestmark = pytest.mark.unit


class QueueMachine(RuleBasedStateMachine):
    """Drives the queue beside a model of it: three plain sets."""

    @initialize(batches=st.lists(st.integers(0, 99), unique=True, max_size=12), most_held=st.integers(1, 3))
    def start(self, batches: list[int], most_held: int) -> None:
        self.queue = BatchQueue(batches, most_held)
        self.most_held = most_held
        self.all = set(batches)
        self.held: dict[int, list[int]] = {}
        self.done: set[int] = set()
        self.first: list[int] = []  # what a death put in front

    def all_held(self) -> set[int]:
        return {batch for held in self.held.values() for batch in held}

    @rule(replica=st.integers(0, 4))
    def take(self, replica: int) -> None:
        if len(self.held.get(replica, [])) == self.most_held:
            assert not self.queue.has_room(replica)
            with pytest.raises(UsageError):
                self.queue.take(replica)
            return
        batch = self.queue.take(replica)
        if batch is None:
            assert self.all == self.done | self.all_held()
            return
        assert batch not in self.done
        assert batch not in self.all_held()
        if self.first:
            assert batch == self.first.pop(0)
        self.held.setdefault(replica, []).append(batch)

    @precondition(lambda self: self.all_held())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from(sorted(self.all_held())))
        replica = self.queue.done(batch)
        self.held[replica].remove(batch)
        self.done.add(batch)

    @rule(replica=st.integers(0, 4))
    def die(self, replica: int) -> None:
        batches = self.held.pop(replica, [])
        assert self.queue.fail(replica) == batches
        self.first = batches + self.first

    @rule(batch=st.integers(0, 99))
    def done_of_nobody(self, batch: int) -> None:
        if batch not in self.all_held():
            with pytest.raises(UsageError):
                self.queue.done(batch)

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        assert self.queue.num_pending + self.queue.num_in_flight + self.queue.num_done == len(self.all)
        assert self.queue.num_done == len(self.done)
        assert self.queue.finished == (self.done == self.all)
        assert all(self.queue.held_by(replica) == held for replica, held in self.held.items())

    def teardown(self) -> None:
        """Whatever happened, what is left can be finished."""
        if not hasattr(self, "queue"):
            return
        for replica in list(self.held):
            self.queue.fail(replica)
        while (batch := self.queue.take(0)) is not None:
            self.queue.done(batch)
            self.done.add(batch)
        assert self.queue.finished
        assert self.done == self.all


TestQueueMachine = QueueMachine.TestCase


@given(st.lists(st.integers(0, 9), min_size=2).filter(lambda b: len(set(b)) < len(b)))
def test_equal_batches_are_refused(batches: list[int]) -> None:
    with pytest.raises(UsageError, match="of them different"):
        BatchQueue(batches)


def test_file_order_and_return_to_the_front() -> None:
    queue = BatchQueue([3, 4, 5])
    assert [queue.take(0), queue.take(1)] == [3, 4]
    assert queue.fail(0) == [3]
    assert queue.fail(0) == []
    assert queue.failures(3) == 1
    assert [queue.take(2), queue.take(3), queue.take(4)] == [3, 5, None]
    with pytest.raises(UsageError, match=r"replica 2 still has \[3\]"):
        queue.take(2)


def test_nothing_to_do_is_finished() -> None:
    assert BatchQueue([]).finished
