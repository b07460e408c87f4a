"""Reading tensors of a checkpoint ahead of their use: whoever takes them copies one while the next ones are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ..manifest import TensorSpec
from .checkpoint import Checkpoint, TensorEntry
from .source import CheckpointSource

Bytes = npt.NDArray[np.uint8]

READERS = 4  # threads: one fills fresh memory at 2 to 3 GB/s, and no disk is fast with one read at a time
LIMIT_BYTES = 1 << 30


class ReadAhead:
    """A checkpoint that ``readers`` threads read, at most ``limit_bytes`` (or one tensor) ahead of use.

    A context: at its end reads under way are waited for, those to come dropped, and files closed. For one thread.
    """

    def __init__(self, checkpoint: Checkpoint, *, readers: int = READERS, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._source = CheckpointSource(checkpoint)
        self._threads = ThreadPoolExecutor(readers, "sidp-read")

    @property
    def bytes_read(self) -> int:
        """From disk, so far."""
        return self._source.bytes_read

    def tensors(self, entries: Sequence[TensorEntry]) -> Iterator[tuple[TensorEntry, Bytes]]:
        """Each entry with its bytes as stored, in memory of its own, in the order given.

        The dtypes are those of ``DTYPE_BYTES``. Raises, at the entry, what ``CheckpointSource.read_into`` does.
        """
        waiting = deque(entries)
        ahead: deque[tuple[TensorEntry, Future[Bytes]]] = deque()
        ahead_bytes = 0
        while waiting or ahead:
            while waiting and (not ahead or ahead_bytes + waiting[0].num_bytes <= self._limit_bytes):
                entry = waiting.popleft()
                ahead.append((entry, self._threads.submit(self._read, entry)))
                ahead_bytes += entry.num_bytes
            entry, future = ahead.popleft()
            yield entry, future.result()
            ahead_bytes -= entry.num_bytes

    def _read(self, entry: TensorEntry) -> Bytes:
        found = np.empty(entry.num_bytes, np.uint8)
        self._source.read_into(entry.name, found.data, TensorSpec(entry.name, entry.shape, entry.dtype))
        return found

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._source.close()
