"""What set-up took of a GPU beside torch's allocator, part by part."""

from __future__ import annotations

import time

import pytest
import torch

from sidp_runtime._torch_gpu import Taken


def test_what_the_driver_lost_and_torch_did_not_reserve_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved = 1000, 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    taken = Taken(0)
    free, reserved = 890, 110  # 10 of them are torch's
    taken.mark("pool")
    free = 840
    taken.mark("runtime")
    free, reserved = 835, 110
    taken.mark("pool")
    assert taken.by_part == {"pool": 105, "runtime": 50}


def test_nothing_is_taken_on_the_host() -> None:
    taken = Taken(None)
    taken.mark("pool")
    assert taken.by_part == {}


def test_the_seconds_of_a_part_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 11.5, 12.0, 15.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    taken = Taken(None)
    for part in ("model", "pool", "model"):
        taken.mark(part)
    assert taken.seconds == {"model": 4.5, "pool": 0.5}
