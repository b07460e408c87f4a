"""Clock and power of the GPU, through nvidia-ml-py where it is installed."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch

MISSING = "nothing to read: the host backend has none, a GPU's needs nvidia-ml-py and a driver that tells it"
_EVERY_S = 0.005


@contextmanager
def gpu_state(device: torch.device, clock_mhz: list[float], power_w: list[float]) -> Iterator[None]:
    """Appends what a GPU had while the body ran: the median clock, the mean power; nothing where it cannot be read."""
    nvml, handle = _open(device)
    if nvml is None:
        yield
        return
    over = threading.Event()
    clocks: list[float] = []
    powers: list[float] = []

    def look() -> None:
        while not over.wait(_EVERY_S):
            clocks.append(float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)))
            power = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
            if power.nvmlReturn == nvml.NVML_SUCCESS:
                powers.append(power.value.uiVal / 1e3)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if clocks:
        clock_mhz.append(statistics.median(clocks))
    if powers:
        power_w.append(statistics.mean(powers))


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
