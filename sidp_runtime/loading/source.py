"""Reading tensors of a checkpoint into memory that is already allocated, one at a time.

A tensor stored in the wanted dtype goes from the file straight into its place. Any other is converted in
pieces of about ``CHUNK_ELEMENTS``, so staging stays at a few MiB whatever the size of the tensor.
"""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ClosedError, ShapeError, UnsupportedError
from ..manifest import TensorSpec, contiguous_strides
from .checkpoint import Checkpoint, TensorEntry, unreadable

Array = npt.NDArray[Any]

#: Elements converted at a time (at least one row).
CHUNK_ELEMENTS = 1 << 20

# Dtypes between which weights are converted, with numpy's type for their bits.
_FLOATS: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_GGUF_NATIVE = {"gguf:F32": "float32", "gguf:F16": "float16", "gguf:BF16": "bfloat16"}


def stored_dtype(entry: TensorEntry) -> str | None:
    """The ``DTYPE_BYTES`` key of the stored elements, or ``None`` when they are quantised blocks."""
    return _GGUF_NATIVE.get(entry.dtype) if entry.dtype.startswith("gguf:") else entry.dtype


def check_readable(entry: TensorEntry, spec: TensorSpec) -> None:
    """Raise ``ShapeError`` or (strides, dtypes) ``UnsupportedError`` unless ``entry`` reads as ``spec``."""
    if entry.shape != spec.shape:
        raise ShapeError(
            f"tensor {entry.name!r} has shape {entry.shape} in {entry.file}, but {spec.shape} was declared"
        )
    if spec.strides != contiguous_strides(spec.shape):
        raise UnsupportedError(f"tensor {entry.name!r}: strides {spec.strides} of shape {spec.shape} are not row-major")
    stored = stored_dtype(entry)
    if stored == spec.dtype and not entry.transform:
        return
    if (stored is not None and stored not in _FLOATS) or spec.dtype not in _FLOATS:
        raise UnsupportedError(
            f"tensor {entry.name!r} is stored as {entry.dtype} and wanted as {spec.dtype}: only "
            f"{', '.join(_FLOATS)} are converted into each other"
        )


def convert_float(values: Array, source: str, target: str) -> Array:
    """Convert between float32, float16 and bfloat16 (bits in uint16), rounding to nearest even.

    Raises ``OverflowError`` when a finite value becomes infinite; the caller knows the tensor's name.
    """
    if source == target:
        return values
    if source == "bfloat16":
        wide: Array = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        wide = values.astype(np.float32, copy=False)
    if target == "float32":
        return wide
    if target == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            result: Array = wide.astype(np.float16)
        infinite = np.isinf(result)
    else:
        bits = wide.view(np.uint32)
        # Half of the dropped part, or one less when the kept part is even: ties go to even.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        result = rounded.astype(np.uint16)
        nan = np.isnan(wide)
        if nan.any():  # rounding may carry a NaN's bits into infinity
            result[nan] = ((bits[nan] >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0)
        infinite = (result & np.uint16(0x7FFF)) == np.uint16(0x7F80)
    if infinite.any():
        lost = int(np.count_nonzero(infinite & np.isfinite(wide)))
        if lost:
            peak = float(np.abs(wide[infinite & np.isfinite(wide)]).max())
            raise OverflowError(f"{lost} values, up to {peak:g} in size, do not fit {target}")
    return result


class CheckpointSource:
    """Reads tensors of a ``Checkpoint``, for several threads at once too; files are opened when first needed.

    ``bytes_read`` counts bytes from disk. ``peak_staging_bytes`` is the most that was held to convert a piece
    of a tensor: as stored, as float32 and as wanted (0 while everything was read straight into place).
    Arithmetic on the piece, ``gguf``'s above all, briefly takes a few times as much.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self.peak_staging_bytes = 0
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()  # descriptors and counters
        self._closed = False

    def read_into(self, name: str, out: memoryview, spec: TensorSpec) -> int:
        """Read tensor ``name`` into ``out``, writable and of exactly ``spec.num_bytes`` bytes.

        ``spec`` gives shape and dtype; its own name is not used. Returns the bytes read from disk. Raises
        ``CheckpointError`` (no such tensor; file gone, changed or cut short), ``ShapeError`` (shape, size of
        ``out``), ``UnsupportedError`` (strides, dtypes, a value too large for the dtype) or ``ClosedError``.
        """
        if self._closed:
            raise ClosedError(f"read of {name!r} from a closed source of {self.checkpoint.root}")
        entry = self.checkpoint.entry(name)
        check_readable(entry, spec)
        view = memoryview(out)
        if view.readonly or not view.c_contiguous or view.nbytes != spec.num_bytes:
            raise ShapeError(
                f"tensor {name!r} needs a writable contiguous buffer of {spec.num_bytes} bytes, not "
                f"{view.nbytes} bytes (read-only: {view.readonly}, contiguous: {view.c_contiguous})",
                num_bytes=spec.num_bytes,
            )
        view = view.cast("B")
        if stored_dtype(entry) == spec.dtype and not entry.transform:
            self.read_stored(entry, 0, view)
        else:
            try:
                self._read_converted(entry, view, spec)
            except OverflowError as error:
                raise UnsupportedError(
                    f"tensor {name!r} stored as {entry.dtype}: {error}; choose another dtype"
                ) from None
        return entry.num_bytes

    def read_stored(self, entry: TensorEntry, start: int, view: memoryview) -> None:
        """Fill ``view``, writable bytes, with those of ``entry`` as stored from its byte ``start`` on.

        Raises ``CheckpointError`` (file gone, changed or cut short) or ``ClosedError``.
        """
        if self._closed:
            raise ClosedError(f"read of {entry.name!r} from a closed source of {self.checkpoint.root}")
        with self._lock:
            descriptor = self._descriptor(entry)
        done = 0
        while done < view.nbytes:
            position = entry.offset + start + done
            try:
                count = os.preadv(descriptor, [view[done:]], position)
            except OSError as error:
                raise CheckpointError(
                    f"{entry.file}: reading {view.nbytes - done} bytes of {entry.name!r} at {position} "
                    f"failed: {error.strerror} (errno {error.errno})"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{entry.file} ended at byte {position}: tensor {entry.name!r} needs {entry.num_bytes} "
                    f"bytes at {entry.offset}; the file was cut short since its header was parsed"
                )
            done += count
            with self._lock:
                self.bytes_read += count

    def _read_converted(self, entry: TensorEntry, view: memoryview, spec: TensorSpec) -> None:
        stored = stored_dtype(entry)
        rows, columns = _rows(entry)
        row_bytes = entry.num_bytes // rows
        order = _row_order(entry, rows)
        target = np.frombuffer(view, dtype=_FLOATS[spec.dtype]).reshape(rows, columns)
        step = max(1, min(rows, CHUNK_ELEMENTS // columns))
        stage = np.empty((step, row_bytes), np.uint8)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            piece = stage[: end - begin]
            self.read_stored(entry, begin * row_bytes, piece.data.cast("B"))
            values = _dequantize(entry, piece) if stored is None else piece.view(_FLOATS[stored])
            result = convert_float(values, stored or "float32", spec.dtype)
            if order is None:
                target[begin:end] = result
            else:
                target[order[begin:end]] = result
            staging = stage.nbytes + 4 * values.size + result.nbytes
            with self._lock:
                self.peak_staging_bytes = max(self.peak_staging_bytes, staging)

    def _descriptor(self, entry: TensorEntry) -> int:
        found = self._descriptors.get(entry.file)
        if found is not None:
            return found
        try:
            descriptor = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(Path(entry.file), error) from error
        size = os.fstat(descriptor).st_size
        known = self.checkpoint.files.get(entry.file, size)
        if size != known:
            os.close(descriptor)
            raise CheckpointError(
                f"{entry.file} has {size} bytes, but had {known} when its header was parsed: open it again",
                expected=known,
                seen=size,
            )
        self._descriptors[entry.file] = descriptor
        return descriptor

    def close(self) -> None:
        """Close the files. May be called twice."""
        self._closed = True
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _rows(entry: TensorEntry) -> tuple[int, int]:
    """The tensor as a matrix: rows are whole blocks, and with two or more dimensions slices of the first."""
    count = math.prod(entry.shape)
    if len(entry.shape) >= 2:
        return entry.shape[0], count // entry.shape[0]
    if stored_dtype(entry) is not None:
        return count, 1
    if entry.transform:
        raise UnsupportedError(f"tensor {entry.name!r}: a quantised vector ({entry.dtype}) cannot be reordered")
    return 1, count


def _row_order(entry: TensorEntry, rows: int) -> npt.NDArray[np.intp] | None:
    """Where each stored row goes; ``None`` when rows stay in place."""
    if not entry.transform:
        return None
    kind, _, number = entry.transform.partition(":")
    heads = int(number) if number.isdecimal() else 0
    if kind not in ("llama-rope-q", "llama-rope-k") or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"tensor {entry.name!r} of {rows} rows: unknown transform {entry.transform!r}")
    # llama.cpp pairs the two halves of each head: stored row (head, i, half) is row (head, half, i).
    places = np.arange(rows, dtype=np.intp).reshape(heads, 2, rows // heads // 2)
    order: npt.NDArray[np.intp] = places.swapaxes(1, 2).reshape(rows)
    return order


def _dequantize(entry: TensorEntry, piece: Array) -> Array:
    from .gguf_reader import import_gguf

    gguf = import_gguf()
    qtype = gguf.GGMLQuantizationType[entry.dtype.removeprefix("gguf:")]
    values: Array = gguf.dequantize(piece, qtype)
    return values
