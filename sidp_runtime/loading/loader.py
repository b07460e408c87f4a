"""Filling layers' buffers from a checkpoint: everything is checked first, then read in file order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import CapacityError, UnknownNameError
from ..manifest import LayerSpec, TensorSpec
from .checkpoint import TensorEntry
from .source import CheckpointSource, check_readable

#: Called after each tensor as ``progress(bytes_done, bytes_total, bytes_per_s)``; bytes as stored on disk.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class LoadReport:
    """What a load did: bytes from disk, bytes of tensors written into the layers, and wall time."""

    bytes_read: int
    bytes_written: int
    seconds: float
    num_tensors: int


def load_layers(
    source: CheckpointSource,
    layers: Sequence[LayerSpec],
    buffers: Mapping[int, memoryview],
    progress: Progress | None = None,
) -> LoadReport:
    """Read the layers whose index is a key of ``buffers``, each into its buffer.

    ``TensorSpec.name`` is the full name in the checkpoint; ``buffers[i]`` is writable and holds at least
    ``layers[i].num_bytes`` bytes, tensor ``t`` at ``layers[i].offsets[t.name]``. Bytes between tensors
    are left alone.

    Before anything is read, raises ``CheckpointError`` for a tensor that the checkpoint lacks, ``ShapeError``
    or ``UnsupportedError`` for one that does not fit, ``UnknownNameError`` for an index without a layer, and
    ``CapacityError`` for a buffer that is too small. While reading, see ``CheckpointSource.read_into``.
    """
    jobs: list[tuple[TensorEntry, TensorSpec, memoryview]] = []
    for index, buffer in buffers.items():
        if not 0 <= index < len(layers):
            raise UnknownNameError(
                f"a buffer was given for layer {index}, but there are {len(layers)} layers", layer=index
            )
        layer = layers[index]
        view = memoryview(buffer).cast("B")
        if view.nbytes < layer.num_bytes:
            raise CapacityError(
                f"layer {index} ({layer.name}) needs {layer.num_bytes} bytes, its buffer has {view.nbytes}",
                layer=index,
                num_bytes=layer.num_bytes,
            )
        for tensor in layer.tensors:
            entry = source.checkpoint.entry(tensor.name)
            check_readable(entry, tensor)
            start = layer.offsets[tensor.name]
            jobs.append((entry, tensor, view[start : start + tensor.num_bytes]))
    jobs.sort(key=lambda job: (job[0].file, job[0].offset))  # disks like order

    total = sum(entry.num_bytes for entry, _, _ in jobs)
    done = written = 0
    begin = time.perf_counter()
    for _, tensor, out in jobs:
        done += source.read_into(tensor.name, out, tensor)
        written += tensor.num_bytes
        if progress is not None:
            progress(done, total, done / max(time.perf_counter() - begin, 1e-9))
    return LoadReport(done, written, time.perf_counter() - begin, len(jobs))
