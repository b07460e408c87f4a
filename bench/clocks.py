"""Clocks of the GPU, through nvidia-ml-py where it is installed."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

MISSING = "no clock to read: the host backend has none, a GPU's needs nvidia-ml-py and a driver that tells it"
_EVERY_S = 0.005


@contextmanager
def sm_clock_mhz(device: torch.device, medians: list[float]) -> Iterator[None]:
    """Appends the median clock of a GPU while the body ran, in MHz; nothing where it cannot be read."""
    nvml, handle = _open(device)
    if nvml is None:
        yield
        return
    over = threading.Event()
    seen: list[float] = []

    def look() -> None:
        while not over.wait(_EVERY_S):
            seen.append(float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if seen:
        medians.append(statistics.median(seen))


@cache  # NVML starts for each process, not for each sample
def _open(device: torch.device) -> tuple[Any, Any]:
    """NVML and the GPU in it, or (None, None)."""
    if device.type != "cuda":
        return None, None
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return None, None
    return nvml, handle
