"""Filling layers: only what was asked for is read, everything is checked first, progress adds up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidp_runtime.errors import CapacityError, CheckpointError, ShapeError, UnknownNameError
from sidp_runtime.loading import Checkpoint, CheckpointSource, load_layers, rich_progress
from sidp_runtime.manifest import LayerSpec, TensorSpec

pytestmark = pytest.mark.unit

NUM_LAYERS = 4


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"model.layers.{i}.{part}": torch.randn(shape).bfloat16()
        for i in range(NUM_LAYERS)
        for part, shape in (("up.weight", (5, 7)), ("norm.weight", (7,)))
    }


@pytest.fixture
def source(tmp_path: Path, weights: dict[str, torch.Tensor]) -> CheckpointSource:
    save_file(weights, tmp_path / "model.safetensors")
    return CheckpointSource(Checkpoint.open(tmp_path))


def layer(i: int, dtype: str = "bfloat16") -> LayerSpec:
    prefix = f"model.layers.{i}."
    return LayerSpec(
        f"layer{i}",
        (
            TensorSpec(prefix + "norm.weight", (7,), dtype),
            TensorSpec(prefix + "up.weight", (5, 7), "bfloat16"),
        ),
    )


def test_only_the_given_layers_are_read(source: CheckpointSource, weights: dict[str, torch.Tensor]) -> None:
    layers = [layer(i, "float32") for i in range(NUM_LAYERS)]
    mine = (1, 3)
    buffers = {i: bytearray(b"\xaa" * (layers[i].num_bytes + 3)) for i in mine}
    calls: list[tuple[int, int, float]] = []
    report = load_layers(source, layers, {i: memoryview(b) for i, b in buffers.items()}, lambda *a: calls.append(a))
    per_layer = 2 * (35 + 7)
    assert report.bytes_read == source.bytes_read == per_layer * len(mine)
    assert report.bytes_written == (2 * 35 + 4 * 7) * len(mine)
    assert report.num_tensors == 2 * len(mine) == len(calls)
    assert report.seconds > 0
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (report.bytes_read, report.bytes_read)
    assert all(total == report.bytes_read and rate > 0 for _, total, rate in calls)
    for i in mine:
        covered = bytearray(len(buffers[i]))
        for tensor in layers[i].tensors:
            start = layers[i].offsets[tensor.name]
            raw = buffers[i][start : start + tensor.num_bytes]
            covered[start : start + tensor.num_bytes] = b"\1" * tensor.num_bytes
            got = torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype)).reshape(tensor.shape)
            assert torch.equal(got.bfloat16(), weights[tensor.name])
        assert all(b == 0xAA for b, used in zip(buffers[i], covered, strict=True) if not used), "padding was written"


def test_reads_go_through_the_file_in_order(source: CheckpointSource, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    real = os.preadv

    def record(fd: int, views: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return real(fd, views, offset)

    monkeypatch.setattr(os, "preadv", record)
    layers = [layer(i) for i in range(NUM_LAYERS)]
    load_layers(source, layers, {i: memoryview(bytearray(layers[i].num_bytes)) for i in (3, 0, 2, 1)})
    assert len(offsets) == 2 * NUM_LAYERS
    assert offsets == sorted(offsets)


def test_everything_is_checked_before_anything_is_read(source: CheckpointSource) -> None:
    good = layer(0)
    room = {0: memoryview(bytearray(4096)), 1: memoryview(bytearray(4096))}
    missing = LayerSpec("x", (TensorSpec("model.layers.9.up.weight", (5, 7), "bfloat16"),))
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.9.up.weight' among its 8"):
        load_layers(source, [good, missing], room)
    wrong = LayerSpec("x", (TensorSpec("model.layers.1.up.weight", (7, 5), "bfloat16"),))
    with pytest.raises(ShapeError, match=r"\(5, 7\).*\(7, 5\)"):
        load_layers(source, [good, wrong], room)
    with pytest.raises(CapacityError, match=rf"layer 1 .* needs {good.num_bytes} bytes, its buffer has 100"):
        load_layers(source, [good, layer(1)], {0: room[0], 1: memoryview(bytearray(100))})
    with pytest.raises(UnknownNameError, match=r"layer 2, but there are 2 layers"):
        load_layers(source, [good, layer(1)], {2: room[0]})
    assert source.bytes_read == 0
    assert bytes(room[0]) == bytes(4096)


def test_no_layers_is_no_work(source: CheckpointSource) -> None:
    report = load_layers(source, [layer(0)], {})
    assert (report.bytes_read, report.bytes_written, report.num_tensors) == (0, 0, 0)


def test_rich_progress_shows_bytes_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with rich_progress("weights") as report:
        report(500_000, 2_000_000, 3_000_000.0)
        report(2_000_000, 2_000_000, 4_000_000.0)
    shown = capsys.readouterr().out
    assert "weights" in shown
    assert "2.0/2.0 MB" in shown
    assert "4.0 MB/s" in shown
