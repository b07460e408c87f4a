"""Reading single tensors: conversions against torch, short reads, files that change, and staging."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sidp_runtime.errors import CheckpointError, ClosedError, ShapeError, UnsupportedError
from sidp_runtime.loading import Checkpoint, CheckpointSource
from sidp_runtime.loading.source import CHUNK_ELEMENTS, convert_float
from sidp_runtime.manifest import TensorSpec

pytestmark = pytest.mark.unit

FLOATS = ["float32", "float16", "bfloat16"]
INTEGER = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def make(root: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, root / "model.safetensors")
    return Checkpoint.open(root)


def read(source: CheckpointSource, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    spec = TensorSpec(name, shape, dtype)
    out = bytearray(spec.num_bytes)
    source.read_into(name, memoryview(out), spec)
    return torch.frombuffer(out, dtype=getattr(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_conversion_equals_torch(tmp_path: Path, stored: str, wanted: str) -> None:
    values = (torch.randn(7, 33) * 3).to(getattr(torch, stored))
    checkpoint = make(tmp_path, w=values)
    with CheckpointSource(checkpoint) as source:
        got = read(source, "w", (7, 33), wanted)
        assert torch.equal(got, values.to(getattr(torch, wanted)))
        assert source.bytes_read == checkpoint.total_bytes == values.nbytes
        assert (source.peak_staging_bytes == 0) == (stored == wanted)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), edge=st.integers(0, 2**32 - 1))
def test_bit_patterns_convert_as_torch_does(stored: str, wanted: str, seed: int, edge: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 2**32, 64, np.uint32)
    raw[:4] = edge, edge & 0xFFFF8000, edge | 0x8000, (edge & 0xFFFF0000) | 0x8000  # ties
    bits = raw.astype(INTEGER[stored])
    tensor = torch.from_numpy(bits.view(np.int32 if stored == "float32" else np.int16).copy())
    tensor = tensor.view(getattr(torch, stored))
    expected = tensor.to(getattr(torch, wanted))
    fits = ~(torch.isinf(expected) & torch.isfinite(tensor))
    values = bits[fits.numpy()].view(np.float32 if stored == "float32" else np.uint16)
    values = values.view(np.float16) if stored == "float16" else values
    got = convert_float(values, stored, wanted)
    as_torch = torch.from_numpy(got.view(np.int32 if wanted == "float32" else np.int16).copy())
    assert torch.equal(
        torch.nan_to_num(as_torch.view(getattr(torch, wanted)).double(), nan=1.25e300, posinf=1e301, neginf=-1e301),
        torch.nan_to_num(expected[fits].double(), nan=1.25e300, posinf=1e301, neginf=-1e301),
    )


@pytest.mark.parametrize(("value", "dtype"), [(70000.0, "float16"), (-3.4e38, "float16"), (3.4e38, "bfloat16")])
def test_value_that_does_not_fit_is_refused(tmp_path: Path, value: float, dtype: str) -> None:
    checkpoint = make(tmp_path, w=torch.tensor([1.0, value, float("inf")]))
    with (
        CheckpointSource(checkpoint) as source,
        pytest.raises(UnsupportedError, match=rf"'w'.*1 values.*{dtype}"),
    ):
        read(source, "w", (3,), dtype)


def test_staging_is_bounded_whatever_the_tensor(tmp_path: Path) -> None:
    rows = 6 * CHUNK_ELEMENTS // 512
    values = torch.arange(rows * 512, dtype=torch.float32).reshape(rows, 512)
    checkpoint = make(tmp_path, w=values)
    spec = TensorSpec("w", (rows, 512), "bfloat16")
    out = bytearray(spec.num_bytes)
    with CheckpointSource(checkpoint) as source:
        tracemalloc.start()
        source.read_into("w", memoryview(out), spec)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert source.peak_staging_bytes == (4 + 4 + 2) * CHUNK_ELEMENTS
    assert peak < values.nbytes, "conversion holds the whole tensor"
    got = torch.frombuffer(out, dtype=torch.bfloat16).reshape(rows, 512)
    assert torch.equal(got, values.to(torch.bfloat16))


def test_same_dtype_is_read_straight_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, w=torch.randn(64, 1024).bfloat16(), i=torch.arange(5))
    real, buffers = os.preadv, []

    def record(fd: int, views: Sequence[Any], offset: int) -> int:
        buffers.append(views[0].obj)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", record)
    spec = TensorSpec("w", (64, 1024), "bfloat16")
    out = bytearray(spec.num_bytes)
    with CheckpointSource(checkpoint) as source:
        source.read_into("w", memoryview(out), spec)
        assert [buffer is out for buffer in buffers] == [True]
        assert source.peak_staging_bytes == 0
        assert read(source, "i", (5,), "int64").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    values = torch.randn(11, 13)
    checkpoint = make(tmp_path, v=torch.randn(3), w=values)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:7]], offset))
    with CheckpointSource(checkpoint) as source:
        assert torch.equal(read(source, "w", (11, 13), wanted), values.to(getattr(torch, wanted)))
        assert source.bytes_read == values.nbytes


def test_file_that_changes_after_parsing(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, w=torch.randn(8))
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with CheckpointSource(checkpoint) as source:
        read(source, "w", (8,), "float32")
        os.truncate(path, size - 4)  # while it is open
        with pytest.raises(CheckpointError, match=rf"ended at byte {size - 4}: tensor 'w' needs 32 bytes at"):
            read(source, "w", (8,), "float32")
    with (
        CheckpointSource(checkpoint) as source,
        pytest.raises(CheckpointError, match=rf"{size - 4} .* {size} when"),
    ):
        read(source, "w", (8,), "float32")
    path.unlink()
    with (
        CheckpointSource(checkpoint) as source,
        pytest.raises(CheckpointError, match=r"cannot be read.*errno 2"),
    ):
        read(source, "w", (8,), "float32")


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make(tmp_path, w=torch.randn(4, 6), i=torch.arange(4))
    checkpoint.config = {"tie_word_embeddings": True}
    with CheckpointSource(checkpoint) as source:
        monkeypatch.setattr(os, "preadv", None)  # nothing may be read
        with pytest.raises(ShapeError, match=r"\(4, 6\).*\(6, 4\) was declared"):
            read(source, "w", (6, 4), "float32")
        with pytest.raises(UnsupportedError, match=r"int64 and wanted as float32"):
            read(source, "i", (4,), "float32")
        with pytest.raises(UnsupportedError, match=r"float32 and wanted as int32"):
            read(source, "w", (4, 6), "int32")
        transposed = TensorSpec("w", (4, 6), "float32", (1, 4))
        with pytest.raises(UnsupportedError, match=r"strides \(1, 4\)"):
            source.read_into("w", memoryview(bytearray(96)), transposed)
        spec = TensorSpec("w", (4, 6), "float32")
        for out in (memoryview(bytearray(95)), memoryview(bytes(96)), memoryview(bytearray(192))[::2]):
            with pytest.raises(ShapeError, match=r"contiguous buffer of 96 bytes"):
                source.read_into("w", out, spec)
        with pytest.raises(CheckpointError, match=r"no tensor 'w2' among its 2; .*closest names are w"):
            read(source, "w2", (4, 6), "float32")
        with pytest.raises(CheckpointError, match=r"ties the head"):
            read(source, "lm_head.weight", (4, 6), "float32")


def test_close_frees_the_files(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, w=torch.randn(4))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    source = CheckpointSource(checkpoint)
    read(source, "w", (4,), "float32")
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with pytest.raises(ClosedError, match=r"'w' from a closed source"):
        read(source, "w", (4,), "float32")
