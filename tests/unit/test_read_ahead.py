"""Reading ahead of use: order and bytes, how far ahead, and what happens to reads that nobody takes."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidp_runtime.errors import CheckpointError
from sidp_runtime.loading import Checkpoint, CheckpointSource, ReadAhead, TensorEntry

pytestmark = pytest.mark.unit

COUNT, NUM_BYTES = 12, 4000


@pytest.fixture
def values(tmp_path: Path) -> dict[str, torch.Tensor]:
    values = {f"t{i:02}": torch.randn(40, 25, dtype=torch.float32) for i in range(COUNT)}
    values["scalar"] = torch.tensor(3.5)
    save_file(values, tmp_path / "model.safetensors")
    return values


@pytest.fixture
def checkpoint(tmp_path: Path, values: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint.open(tmp_path)


def entries_of(checkpoint: Checkpoint) -> list[TensorEntry]:
    return [checkpoint.entry(f"t{i:02}") for i in reversed(range(COUNT))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors whose reads have begun."""
    begun: list[str] = []
    plain = CheckpointSource.read_stored

    def read_stored(source: CheckpointSource, entry: TensorEntry, *rest: object) -> None:
        begun.append(entry.name)
        time.sleep(0.02)
        plain(source, entry, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointSource, "read_stored", read_stored)
    return begun


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_tensors_come_in_the_order_asked_for_with_their_bytes(
    checkpoint: Checkpoint, values: dict[str, torch.Tensor]
) -> None:
    asked = [*entries_of(checkpoint), checkpoint.entry("scalar")]
    with ReadAhead(checkpoint) as source:
        taken = list(source.tensors(asked))
        assert source.bytes_read == COUNT * NUM_BYTES + 4
    assert [entry.name for entry, _ in taken] == [entry.name for entry in asked]
    for entry, stored in taken:  # each in memory of its own: all are still right
        assert torch.equal(torch.from_numpy(stored).view(torch.float32).view(entry.shape), values[entry.name])


def test_as_many_are_read_ahead_as_the_limit_holds(checkpoint: Checkpoint, reads: list[str]) -> None:
    asked = entries_of(checkpoint)
    with ReadAhead(checkpoint, limit_bytes=3 * NUM_BYTES) as source:
        taken = source.tensors(asked)
        next(taken)
        wait_until(lambda: len(reads) == 3)  # without anyone asking for the second
        time.sleep(0.05)
        assert sorted(reads) == sorted(entry.name for entry in asked[:3])
        next(taken)
        wait_until(lambda: len(reads) == 4)
    with ReadAhead(checkpoint, limit_bytes=1) as source:  # one at least
        assert len(list(source.tensors(asked))) == COUNT


def test_threads_read_tensors_and_pieces_of_one_beside_each_other(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_in = threading.Barrier(3, timeout=10)
    plain = CheckpointSource.read_stored

    def read_stored(source: CheckpointSource, *rest: object) -> None:
        all_in.wait()  # breaks unless three are here at once
        plain(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointSource, "read_stored", read_stored)
    with ReadAhead(checkpoint, readers=3) as source:
        assert len(list(source.tensors(entries_of(checkpoint)))) == COUNT
    with ReadAhead(checkpoint, readers=3, piece_bytes=-(-NUM_BYTES // 3), limit_bytes=1) as source:
        assert len(list(source.tensors(entries_of(checkpoint)))) == COUNT


@pytest.mark.parametrize("piece_bytes", [1, 7, NUM_BYTES - 1, NUM_BYTES])
def test_pieces_come_together(checkpoint: Checkpoint, values: dict[str, torch.Tensor], piece_bytes: int) -> None:
    entry = checkpoint.entry("t03")
    given: list[np.ndarray[Any, Any]] = []

    def allocate(num_bytes: int) -> np.ndarray[Any, Any]:
        given.append(np.full(num_bytes, 255, np.uint8))
        return given[-1]

    with ReadAhead(checkpoint, piece_bytes=piece_bytes, allocate=allocate) as source:
        ((_, stored),) = source.tensors([entry])
        assert source.bytes_read == NUM_BYTES
    assert stored is given[0]
    assert torch.equal(torch.from_numpy(stored).view(torch.float32).view(entry.shape), values["t03"])


def test_memory_that_cannot_be_had_is_an_error_at_its_tensor(checkpoint: Checkpoint) -> None:
    def allocate(num_bytes: int) -> np.ndarray[Any, Any]:
        raise MemoryError(f"{num_bytes} bytes")

    with ReadAhead(checkpoint, allocate=allocate) as source, pytest.raises(MemoryError, match=f"{NUM_BYTES} bytes"):
        next(source.tensors(entries_of(checkpoint)))


def test_threads_share_the_open_files_and_count_every_byte(tmp_path: Path) -> None:
    for file in range(8):
        save_file({f"t{file}.{i}": torch.ones(5000) for i in range(16)}, tmp_path / f"part-{file}.safetensors")
    names = {f"t{file}.{i}": f"part-{file}.safetensors" for file in range(8) for i in range(16)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    checkpoint = Checkpoint.open(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ReadAhead(checkpoint, readers=16) as source:
        assert len(list(source.tensors(list(checkpoint.entries.values())))) == 128
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 8
        assert source.bytes_read == checkpoint.total_bytes == 128 * 20_000


def test_an_error_is_raised_at_its_tensor(
    tmp_path: Path, checkpoint: Checkpoint, values: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    asked = sorted(entries_of(checkpoint), key=lambda entry: entry.offset)
    with ReadAhead(checkpoint, readers=1, limit_bytes=1) as source:
        taken = source.tensors(asked)
        next(taken)
        os.truncate(path, asked[-1].offset + 10)
        for _ in asked[1:-1]:
            next(taken)
        with pytest.raises(CheckpointError, match=f"tensor '{asked[-1].name}' needs {NUM_BYTES} bytes"):
            next(taken)


def test_what_nobody_takes_is_not_read_on(checkpoint: Checkpoint, reads: list[str]) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with ReadAhead(checkpoint, readers=1) as source:
        next(source.tensors(entries_of(checkpoint)))
    assert len(reads) < COUNT - 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sidp-read")]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
