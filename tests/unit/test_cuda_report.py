"""_C.cuda_report(): says why there is no GPU, and reads what a driver offers (a fake one, built here)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sidp_runtime import _C

pytestmark = pytest.mark.unit

FAKE_DRIVER = Path(__file__).resolve().parents[1] / "helpers" / "fake_cuda_driver.c"
ASK = "import json; from sidp_runtime import _C; print(json.dumps(_C.cuda_report()))"

needs_cuda_part = pytest.mark.skipif(
    not _C.cuda_report()["compiled"], reason="this build has no CUDA part: no CUDA headers where it was built"
)


def report_with_driver(folder: Path, *compiler_flags: str, **environment: str) -> dict[str, Any]:
    """The report of a fresh process that finds the fake libcuda.so.1 first."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", *compiler_flags, str(FAKE_DRIVER), "-o", str(library)]
    subprocess.run(command, check=True, timeout=60)
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)} | environment
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_report_is_plain_data_and_says_why() -> None:
    report = _C.cuda_report()
    assert set(report) == {"compiled", "compiled_version", "driver", "reason", "devices"}
    json.dumps(report)  # plain data
    assert (report["compiled_version"] is not None) == report["compiled"]
    assert bool(report["reason"]) == (not report["devices"])


@needs_cuda_part
def test_missing_driver_is_named() -> None:
    report = _C.cuda_report()
    if report["driver"] is not None:
        pytest.skip("this machine has an NVIDIA driver")
    assert "libcuda.so.1" in report["reason"]
    assert report["devices"] == []


@needs_cuda_part
def test_reads_every_field_of_each_device(tmp_path: Path) -> None:
    report = report_with_driver(tmp_path)
    assert report["reason"] == ""
    assert report["driver"] == "13.1"
    assert report["devices"] == [
        {
            "ordinal": 0,
            "name": "Fake GPU zero",
            "uuid": "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff",
            "memory_bytes": 80 << 30,
            "compute_capability": [9, 0],
            "num_sms": 132,
            "num_async_engines": 3,
            "stream_mem_ops_64bit": True,
            "stream_wait_value_nor": True,
            "flush_remote_writes": False,
            "can_access_peer": [True, True],
        },
        {
            "ordinal": 1,
            "name": "Fake GPU one",
            "uuid": "GPU-e0e1e2e3-e4e5-e6e7-e8e9-eaebecedeeef",
            "memory_bytes": 81 << 30,
            "compute_capability": [9, 0],
            "num_sms": 132,
            "num_async_engines": 3,
            "stream_mem_ops_64bit": True,
            "stream_wait_value_nor": True,
            "flush_remote_writes": True,
            "can_access_peer": [False, True],
        },
    ]


@needs_cuda_part
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_CUDA_INIT": "100"}, ["cuInit", "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device"]),
        ({"FAKE_CUDA_INIT": "77777"}, ["cuInit", "CUDA error 77777"]),
        ({"FAKE_CUDA_DEVICES": "0"}, ["no device", "CUDA_VISIBLE_DEVICES"]),
        ({"FAKE_CUDA_FAIL_ATTRIBUTE": "16"}, ["MULTIPROCESSOR_COUNT", "device 0", "CUDA error 999"]),
    ],
    ids=["no device", "unknown code", "none visible", "attribute"],
)
def test_failures_of_the_driver_become_the_reason(
    tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    report = report_with_driver(tmp_path, **environment)
    assert report["devices"] == []
    assert report["driver"] == "13.1"
    for word in words:
        assert word in report["reason"]


@needs_cuda_part
def test_driver_without_a_function_is_too_old(tmp_path: Path) -> None:
    report = report_with_driver(tmp_path, "-DWITHOUT_UUID")
    assert "lacks cuDeviceGetUuid_v2" in report["reason"]
    assert "too old" in report["reason"]
    assert report["driver"] is None
