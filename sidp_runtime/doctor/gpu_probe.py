"""What must be asked of the GPUs in a process of its own (``python -m sidp_runtime.doctor.gpu_probe NVSHMEM_LIBRARY``).

It starts CUDA on every GPU and loads NVSHMEM's library and NVML: each may hang, crash, or change the process. Every
answer is written as soon as it is there, a line of JSON each, so that one that hangs costs only those after it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

from .. import _C

NVML_LIBRARY = "libnvidia-ml.so.1"

#: Time for the copies between all GPUs together, without the start of CUDA.
COPY_BUDGET_MS = 1000

# nvml.h
_MAX_LANES = 18  # NVML_NVLINK_MAX_LINKS
_LANE_SPEED = 164  # NVML_FI_DEV_NVLINK_GET_SPEED: of the lane in scopeId, each way, 1e6 bytes a second


class _FieldValue(ctypes.Structure):
    """``nvmlFieldValue_t``; ``value`` is a union, of which the lowest 32 bits count for a speed."""

    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("type", ctypes.c_int),
        ("result", ctypes.c_int),
        ("value", ctypes.c_ulonglong),
    )


def nvlinks(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Active NVLink lanes of each GPU: ``gpus`` (ordinal, lanes, gbps of all lanes together each way, None where NVML
    does not tell) and ``reason`` (why there is no answer, "" when there is one)."""
    try:
        nvml = ctypes.CDLL(NVML_LIBRARY)
        return {"reason": "", "gpus": _nvlinks(nvml, devices)}
    except OSError as error:
        return {
            "reason": f"{NVML_LIBRARY} cannot be loaded ({error}); it is part of the NVIDIA driver, and a container "
            "has it with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            "gpus": [],
        }
    except (AttributeError, RuntimeError) as error:  # a function that is not there; one that failed
        return {"reason": f"{NVML_LIBRARY}: {error}", "gpus": []}


def _nvlinks(nvml: ctypes.CDLL, devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def must(result: int, call: str) -> None:
        if result != 0:
            nvml.nvmlErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{call} failed: {nvml.nvmlErrorString(result).decode()}")

    must(nvml.nvmlInit_v2(), "nvmlInit")
    gpus = []
    for device in devices:
        handle, state = ctypes.c_void_p(), ctypes.c_uint()
        uuid = device["uuid"].encode()
        must(
            nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)), f"nvmlDeviceGetHandleByUUID of {uuid.decode()}"
        )
        lanes, mbps = 0, []
        for lane in range(_MAX_LANES):
            # An error here: this GPU has no such lane.
            if nvml.nvmlDeviceGetNvLinkState(handle, lane, ctypes.byref(state)) != 0 or state.value != 1:
                continue
            lanes += 1
            speed = _FieldValue(field=_LANE_SPEED, scope=lane)
            if nvml.nvmlDeviceGetFieldValues(handle, 1, ctypes.byref(speed)) == 0 and speed.result == 0:
                mbps.append(speed.value & 0xFFFFFFFF)
        gpus.append({
            "ordinal": device["ordinal"],
            "lanes": lanes,
            "gbps": sum(mbps) / 1000 if len(mbps) == lanes else None,
        })  # fmt: skip
    return gpus


def nvshmem_version(library: str) -> str | None:
    """Version that NVSHMEM's host library says it has, e.g. "3.4.5"; None if it cannot be asked."""
    numbers = [ctypes.c_int() for _ in range(3)]
    try:
        ctypes.CDLL(library).nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    except (OSError, AttributeError):
        return None
    return ".".join(str(number.value) for number in numbers)


def main(nvshmem_library: str) -> None:
    """Writes the answers."""

    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    say(nvlinks=nvlinks(_C.cuda_report()["devices"]))
    say(nvshmem_version=nvshmem_version(nvshmem_library) if nvshmem_library else None)
    say(copies=_C.measure_copies(COPY_BUDGET_MS))


if __name__ == "__main__":
    main(sys.argv[1])
