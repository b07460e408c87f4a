"""Reading tensors of a checkpoint ahead of their use: whoever takes them copies one while the next ones are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint, TensorEntry
from .source import CheckpointSource

Bytes = npt.NDArray[np.uint8]

READERS = 8  # threads: one copies 3 to 4 GB/s out of the page cache, and no disk is fast with one read at a time
PIECE_BYTES = 32 << 20  # of a tensor, for one thread
LIMIT_BYTES = 1 << 30


def fresh_memory(num_bytes: int) -> Bytes:
    """Pageable, not filled."""
    return np.empty(num_bytes, np.uint8)


class ReadAhead:
    """A checkpoint that ``readers`` threads read, at most ``limit_bytes`` (or one tensor) ahead of use.

    Threads share a tensor in pieces of ``piece_bytes``. ``allocate`` gives a tensor's memory, which is the taker's; it
    is called in the threads. A context: at its end reads under way are waited for, those to come dropped, and files
    closed. For one thread.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        readers: int = READERS,
        limit_bytes: int = LIMIT_BYTES,
        piece_bytes: int = PIECE_BYTES,
        allocate: Callable[[int], Bytes] = fresh_memory,
    ) -> None:
        self._limit_bytes, self._piece_bytes = limit_bytes, piece_bytes
        self._allocate = allocate
        self._source = CheckpointSource(checkpoint)
        self._threads = ThreadPoolExecutor(readers, "sidp-read")

    @property
    def bytes_read(self) -> int:
        """From disk, so far."""
        return self._source.bytes_read

    def tensors(self, entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, Bytes]]:
        """Each entry with its bytes as stored, in memory of its own, in the order given.

        Raises, at the entry, what ``CheckpointSource.read_stored`` does.
        """
        waiting = deque(entries)
        ahead: deque[tuple[TensorEntry, Future[Bytes], list[Future[None]]]] = deque()
        ahead_bytes = 0
        while waiting or ahead:
            while waiting and (not ahead or ahead_bytes + waiting[0].num_bytes <= self._limit_bytes):
                entry = waiting.popleft()
                memory = self._threads.submit(self._allocate, entry.num_bytes)
                starts = range(0, entry.num_bytes, self._piece_bytes)
                ahead.append((entry, memory, [self._threads.submit(self._read, entry, memory, s) for s in starts]))
                ahead_bytes += entry.num_bytes
            entry, memory, pieces = ahead.popleft()
            for piece in pieces:
                piece.result()
            yield entry, memory.result()
            ahead_bytes -= entry.num_bytes

    def _read(self, entry: TensorEntry, memory: Future[Bytes], start: int) -> None:
        # It was submitted before, so it is finished or in the hands of another thread
        view = memory.result()[start : start + self._piece_bytes]
        self._source.read_stored(entry, start, view.data)

    def close(self) -> None:
        """As at the end of the context. May be called twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._source.close()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
