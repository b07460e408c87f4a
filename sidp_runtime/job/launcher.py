"""The launcher's part of a job: starts the group, hands out batches, outlives the death of replicas."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .. import errors
from ..errors import PeerDeadError, SidpError
from . import protocol
from .prompts import Batch
from .queue import BatchQueue
from .replicas import CLOSE_S, MakeStore, Replica, ReplicaSet, Target, default_store

#: Called as ``on_event(name, *arguments)``:
#: ``starting`` (attempt), ``loading`` (done, total: bytes of all ranks), ``ready`` (pids by rank),
#: ``batch_done`` (batch, rank), ``replica_died`` (rank, words), ``warning`` (text), ``notice`` (text),
#: ``planned`` (prompts in all, prompts already finished), ``progress`` (prompts written, tokens of this run).
OnEvent = Callable[..., None]
#: Called with the rank, the batch number, the new token ids and the finish reasons of its sequences.
OnResult = Callable[[int, int, list[list[int]], list[str]], None]

RESTARTS = 2  # of a group that dies before all of it is ready
BATCH_FAILURES = 3  # replicas that may go down with one batch before the batch is to blame
_TICK_S = 0.5

# In start-up, these tell of another rank's death; anything else would only happen again.
_WORTH_A_RESTART = ("PeerDeadError", "DeadlineError")


class JobInterrupted(SidpError):
    """The job was stopped by a signal, ``signum``. What was written stays, and the same command goes on from there."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command goes on from what is written")
        self.signum = signum


class _StartFailed(Exception):
    """The group died before all of it was ready."""


@contextmanager
def _signals() -> Iterator[int | None]:
    """Yields a descriptor from which SIGINT and SIGTERM can be read as bytes; None outside the main thread.

    After the first one the handlers of before are back: a second Ctrl-C does not wait.
    """
    read_end, write_end = os.pipe()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        restore()
        os.write(write_end, bytes([number]))

    try:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, handle)
        except ValueError:
            before.clear()
            yield None
        else:
            yield read_end
    finally:
        restore()
        os.close(read_end)
        os.close(write_end)


class Launcher:
    """Runs batches on ``world_size`` replicas. ``settings`` goes to each, with rank, token and store added.

    ``most_held``: batches that a replica has at a time.

    ``target``, ``make_store``, ``close_s`` are for tests. ``silence_ms``: see ``JobConfig``.
    """

    def __init__(
        self,
        world_size: int,
        settings: dict[str, Any],
        batches: Sequence[Batch],
        *,
        target: Target,
        max_new_tokens: int,
        deadline_ms: int,
        silence_ms: int,
        on_result: OnResult,
        on_event: OnEvent,
        most_held: int = 1,
        make_store: MakeStore = default_store,
        close_s: float = CLOSE_S,
    ) -> None:
        self._most_held = most_held
        self._world_size = world_size
        self._settings = settings
        self._batches = {batch.index: batch for batch in batches}
        self._target = target
        self._max_new_tokens = max_new_tokens
        self._deadline_ms = deadline_ms
        self._silence_s = silence_ms / 1000
        self._on_result = on_result
        self._on_event = on_event
        self._make_store = make_store
        self._close_s = close_s
        self._wake: int | None = None
        self.restarts = 0
        self.start_s = 0.0  # until all replicas of the last attempt were ready
        self.work_s = 0.0

    def run(self) -> list[Replica]:
        """Runs all batches; returns the replicas with what they reported.

        Raises ``PeerDeadError`` when the group cannot be started or nobody is left, ``JobInterrupted``, and what a
        replica reported at start-up. Every process has ended when it returns or raises.
        """
        with _signals() as self._wake:
            group = self._start()
            graceful = False
            try:
                self._work(group)
                self._collect_stats(group)
                graceful = True
            except JobInterrupted:
                graceful = True
                raise
            finally:
                group.end(graceful=graceful)
            return group.replicas

    # --- Start-up ---------------------------------------------------------------------------------------------------

    def _start(self) -> ReplicaSet:
        for attempt in range(1, RESTARTS + 2):
            self._on_event("starting", attempt)
            begin = time.monotonic()
            group = ReplicaSet(
                self._world_size,
                self._settings,
                self._target,
                deadline_ms=self._deadline_ms,
                make_store=self._make_store,
                close_s=self._close_s,
            )
            try:
                self._wait_ready(group)
            except _StartFailed as error:
                group.end(graceful=False)
                if attempt > RESTARTS:
                    raise PeerDeadError(
                        f"the group of {self._world_size} died {attempt} times before it was ready; the last time "
                        f"{error}; fewer replicas, or bfloat16, need less memory"
                    ) from None
                self.restarts += 1
                self._on_event("warning", f"{error} before the group was ready; starting it again")
            except BaseException:
                group.end(graceful=False)
                raise
            else:
                self.start_s = time.monotonic() - begin
                return group
        raise AssertionError("unreachable")

    def _wait_ready(self, group: ReplicaSet) -> None:
        loading: dict[int, tuple[int, int]] = {}
        warned: set[str] = set()
        while not all(replica.ready for replica in group.replicas):
            for replica, message in self._poll(group):
                kind = None if message is None else message["type"]
                if message is None:
                    raise _StartFailed(f"replica {replica.rank} {replica.words}")
                if kind == "error":
                    self._refuse_start(replica, message)
                elif kind == "loading":
                    loading[replica.rank] = (message["done"], message["total"])
                    self._on_event("loading", *(sum(part) for part in zip(*loading.values(), strict=True)))
                elif kind == "warning" and message["text"] not in warned:  # ranks alike say the same
                    warned.add(message["text"])
                    self._on_event("warning", f"replica {replica.rank}: {message['text']}")
                elif kind == "ready":
                    replica.ready = True
                    replica.memory, replica.load = message["memory"], message["load"]
            self._drop_silent(group, lambda replica: not replica.ready)
            if dead := [replica for replica in group.replicas if not replica.alive]:
                raise _StartFailed(f"replica {dead[0].rank} {dead[0].words}")
        self._on_event("ready", [replica.pid for replica in group.replicas])

    @staticmethod
    def _refuse_start(replica: Replica, message: protocol.Message) -> None:
        words = f"replica {replica.rank} reports: {message['message']}"
        if message["error"] in _WORTH_A_RESTART:
            raise _StartFailed(words)
        kind = getattr(errors, message["error"], None)
        if isinstance(kind, type) and issubclass(kind, SidpError):
            raise kind(words, rank=replica.rank)
        raise SidpError(f"replica {replica.rank} reports {message['error']}: {message['message']}", rank=replica.rank)

    # --- Work -------------------------------------------------------------------------------------------------------

    def _work(self, group: ReplicaSet) -> None:
        queue = BatchQueue(self._batches, self._most_held)
        begin = time.monotonic()
        while not queue.finished:
            for replica in group.alive:
                while replica.alive and queue.has_room(replica.rank) and queue.num_pending:
                    self._give(group, replica, queue)
            self._bury(group, queue)
            for replica, message in self._poll(group):
                if message is not None and (replica.alive or message["type"] == "error"):
                    self._hear(group, replica, message, queue)
            self._drop_silent(group, lambda replica: bool(queue.held_by(replica.rank)))
            self._bury(group, queue)
        self.work_s = time.monotonic() - begin

    def _give(self, group: ReplicaSet, replica: Replica, queue: BatchQueue) -> None:
        if not queue.held_by(replica.rank):
            replica.heard = time.monotonic()
        index = queue.take(replica.rank)
        assert index is not None
        input_ids = [request.input_ids for request in self._batches[index].requests]
        group.send(replica, "batch", batch=index, input_ids=input_ids, max_new_tokens=self._max_new_tokens)

    def _hear(self, group: ReplicaSet, replica: Replica, message: protocol.Message, queue: BatchQueue) -> None:
        kind = message["type"]
        if kind == "error":
            replica.words = ""  # it may have ended since, and then says more than its exit code
            group.drop(replica, f"reports {message['error']}: {message['message']}")
        elif kind == "result":
            index, sequences, finish = message["batch"], message["sequences"], message["finish"]
            held = queue.held_by(replica.rank)
            if index not in held or not len(sequences) == len(finish) == len(self._batches[index].requests):
                group.drop(replica, f"answered batch {index} with {len(sequences)} sequences, but had {held}")
                return
            # Written first: a batch is done when its lines are on disk.
            self._on_result(replica.rank, index, sequences, finish)
            queue.done(index)
            replica.batches += 1
            replica.tokens += sum(len(sequence) for sequence in sequences)
            replica.busy_s += message["seconds"]
            self._on_event("batch_done", index, replica.rank)

    def _bury(self, group: ReplicaSet, queue: BatchQueue) -> None:
        """Takes note of the dead: their batches go to the others."""
        for replica in group.replicas:
            if replica.alive or not replica.ready:
                continue
            replica.ready = False
            batches = queue.fail(replica.rank)
            self._on_event("replica_died", replica.rank, replica.words)
            if not group.alive:
                raise PeerDeadError(
                    f"no replica is left of {self._world_size}; the last, {replica.rank}, {replica.words}; "
                    f"{queue.num_done} of {queue.num_total} batches are written, and the same command goes on "
                    "from there",
                    rank=replica.rank,
                )
            for batch in batches:
                if queue.failures(batch) >= BATCH_FAILURES:
                    ids = ", ".join(repr(request.id) for request in self._batches[batch].requests)
                    raise PeerDeadError(
                        f"batch {batch} (prompts {ids}) took {queue.failures(batch)} replicas down with it; the last, "
                        f"{replica.rank}, {replica.words}",
                        rank=replica.rank,
                    )
            left = f"; {len(group.alive)} of {self._world_size} go on" + (
                f" with its batch {batches[0]}" if batches else ""
            )
            left += f" and {len(batches) - 1} more" if len(batches) > 1 else ""
            self._on_event("warning", f"replica {replica.rank} {replica.words}{left}")

    def _collect_stats(self, group: ReplicaSet) -> None:
        """Asks before any is closed: what a rank holds of shared pages depends on who else maps them."""
        asked = group.alive
        limit = time.monotonic() + self._deadline_ms / 1000
        for replica in asked:
            group.send(replica, "stats")
        while any(replica.alive and not replica.stats for replica in asked) and time.monotonic() < limit:
            for replica, message in self._poll(group):
                if message is not None and message["type"] == "stats":
                    replica.stats, replica.memory = message["stats"], message["memory"]
        for replica in asked:
            if not replica.stats:
                why = replica.words or f"gave none for {self._deadline_ms} ms"
                self._on_event("warning", f"no closing figures of replica {replica.rank}: it {why}")

    def _poll(self, group: ReplicaSet) -> list[tuple[Replica, protocol.Message | None]]:
        events = group.poll(_TICK_S, self._wake)
        if self._wake is not None and (number := _read_signal(self._wake)):
            raise JobInterrupted(number)
        return events

    def _drop_silent(self, group: ReplicaSet, should_speak: Callable[[Replica], bool]) -> None:
        now = time.monotonic()
        for replica in group.alive:
            if should_speak(replica) and now - replica.heard > self._silence_s:
                group.drop(replica, f"made no progress for {self._silence_s:.0f} s and was ended")


def _read_signal(descriptor: int) -> int:
    import select

    ready, _, _ = select.select([descriptor], [], [], 0)
    return os.read(descriptor, 1)[0] if ready else 0
