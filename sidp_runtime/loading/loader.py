"""Filling layers' buffers from a checkpoint: everything is checked first, then read in file order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
    jobs: list[_Job] = []
    for index, buffer in buffers.items():
        if not 0 <= index < len(layers):
            raise UnknownNameError(
                f"a buffer was given for layer {index}, but there are {len(layers)} layers", layer=index
            )
        jobs += _jobs(source, index, layers[index], memoryview(buffer).cast("B"))
    jobs.sort(key=lambda job: (job[0].file, job[0].offset))  # disks like order
    return _read(source, [(jobs, lambda: None)], progress)


def load_layers_staged(
    source: CheckpointSource,
    layers: Mapping[int, LayerSpec],
    write: Callable[[int, memoryview], None],
    progress: Progress | None = None,
) -> LoadReport:
    """Read layers one after the other into a host buffer of the largest, each handed to ``write(index, bytes)``.

    For memory that cannot be read into, a GPU's. The buffer is used again as soon as ``write`` returns. Errors as
    ``load_layers``.
    """
    staging = memoryview(bytearray(max((layer.num_bytes for layer in layers.values()), default=0)))
    return _read(
        source,
        [
            (_jobs(source, index, layer, staging), partial(write, index, staging[: layer.num_bytes]))
            for index, layer in layers.items()
        ],
        progress,
    )


_Job = tuple[TensorEntry, TensorSpec, memoryview]


def _jobs(source: CheckpointSource, index: int, layer: LayerSpec, view: memoryview) -> list[_Job]:
    """What to read for a layer, checked."""
    if view.nbytes < layer.num_bytes:
        raise CapacityError(
            f"layer {index} ({layer.name}) needs {layer.num_bytes} bytes, its buffer has {view.nbytes}",
            layer=index,
            num_bytes=layer.num_bytes,
        )
    jobs = []
    for tensor in layer.tensors:
        entry = source.checkpoint.entry(tensor.name)
        check_readable(entry, tensor)
        start = layer.offsets[tensor.name]
        jobs.append((entry, tensor, view[start : start + tensor.num_bytes]))
    return jobs


def _read(
    source: CheckpointSource,
    batches: Sequence[tuple[Sequence[_Job], Callable[[], None]]],
    progress: Progress | None,
) -> LoadReport:
    """Reads each batch in order and calls what follows it."""
    total = sum(entry.num_bytes for jobs, _ in batches for entry, _, _ in jobs)
    done = written = count = 0
    begin = time.perf_counter()
    for jobs, then in batches:
        for _, tensor, out in jobs:
            done += source.read_into(tensor.name, out, tensor)
            written += tensor.num_bytes
            count += 1
            if progress is not None:
                progress(done, total, done / max(time.perf_counter() - begin, 1e-9))
        then()
    return LoadReport(done, written, time.perf_counter() - begin, count)
