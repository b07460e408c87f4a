"""Where the link of a GPU is measured: never inside one GPU, and a full one is no crash. torch is a stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidp_runtime import _C, MachineProfile, Placement, _torch_gpu, policy
from sidp_runtime.errors import CapacityError, ConfigError
from sidp_runtime.group import Group

pytestmark = pytest.mark.unit

PROFILE = MachineProfile(copy_bytes_per_s=1e11, round_trip_us=10.0, memory_bytes_per_s=3e12, flops_per_s=1e14)
MAPPED = b"layer %d as mapped here"


def pool_of(rank: int, gpus: list[str]) -> Any:
    """Layers of rising sizes, three of each rank, and the group's GPUs by UUID."""
    group = Group.__new__(Group)
    group.rank, group._gpus = rank, gpus
    sizes = [1 << (10 + i) for i in range(3 * len(gpus))]
    return SimpleNamespace(group=group, placement=Placement.by_layer(sizes, len(gpus)), core=None)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Free bytes of the GPUs that this process sees, by ordinal; what is allocated there lies on the host."""
    free = {0: 1 << 40}

    def ones(size: int, dtype: torch.dtype, device: str) -> str:
        if size > free[int(device.removeprefix("cuda:"))]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return f"memory of {device}"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(_C, "peer_layer", lambda core, layer: MAPPED % layer)
    monkeypatch.setattr(_torch_gpu, "from_dlpack", lambda view: view)
    return free


def test_a_rank_on_the_same_gpu_has_no_link_to_measure(visible: dict[int, int]) -> None:
    mine = pool_of(0, ["a", "b"])
    largest = max(mine.placement.streamed_layers(0), key=mine.placement.layer_bytes)
    assert _torch_gpu._link_source(0, mine) == MAPPED % largest
    assert _torch_gpu._link_source(0, pool_of(0, ["a", "a"])) is None
    # of three ranks, the one with a GPU of its own
    three = pool_of(0, ["a", "b", "a"])
    owned = [i for i in range(9) if three.placement.owner(i) == 1]
    assert _torch_gpu._link_source(0, three) == MAPPED % max(owned, key=three.placement.layer_bytes)
    visible[1] = 1 << 40
    assert _torch_gpu._link_source(0, pool_of(0, ["a", "a"])) == "memory of cuda:1"


def test_a_full_gpu_is_passed_over_and_then_the_link_is_assumed(
    visible: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    visible.update({1: 0, 2: 1 << 40})
    assert _torch_gpu._link_source(0, None) == "memory of cuda:2"
    visible[2] = 0
    assert _torch_gpu.measure_link(0, None) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert _torch_gpu._bundled_link(0) > 1e11
    (doubt,) = policy.doubts(replace(PROFILE, copy_bytes_per_s=5.9e9), 0)
    assert doubt.startswith("copy_bytes_per_s 5.9 GB/s, known 39")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    with pytest.raises(ConfigError, match="no other GPU is visible here with 256 MiB free"):
        _torch_gpu._bundled_link(0)
    assert policy.doubts(PROFILE, 0) == []  # nothing is known of it


@pytest.mark.parametrize("call", [_torch_gpu.measure, _torch_gpu.measure_link])
def test_no_room_on_the_own_gpu_is_a_typed_error(
    visible: dict[int, int], monkeypatch: pytest.MonkeyPatch, call: Callable[[int, Any], object]
) -> None:
    def full(*size: object, **where: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", full)
    with pytest.raises(CapacityError, match="device 0 has no room to measure its profile: CUDA out of memory"):
        call(0, pool_of(0, ["a", "b"]))
    monkeypatch.setattr(torch, "randn", full)
    monkeypatch.setattr(_torch_gpu, "measure_link", lambda device, pool: 1e9)
    with pytest.raises(CapacityError, match="sidp calibrate"):
        _torch_gpu.measure(0, None)
