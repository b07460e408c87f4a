"""What sidp doctor asks of the GPUs together: lanes, versions and copies, over a fake driver and a fake NVML."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sidp_runtime import _C, doctor
from sidp_runtime.doctor import gpu_probe, gpus

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(
        not _C.cuda_report()["compiled"], reason="this build has no CUDA part: no CUDA headers where it was built"
    ),
]

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


def compile_library(source: Path, library: Path) -> None:
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True, timeout=60)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver of two GPUs and their NVML."""
    folder = tmp_path_factory.mktemp("libraries")
    compile_library(HELPERS / "fake_cuda_driver.c", folder / "libcuda.so.1")
    compile_library(HELPERS / "fake_nvml.c", folder / "libnvidia-ml.so.1")
    return folder


@pytest.fixture
def probe(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks a child that finds the fake libraries, in the environment given."""

    def ask(**environment: str) -> doctor.GpuProbe:
        for name, value in ({"LD_LIBRARY_PATH": str(libraries)} | environment).items():
            monkeypatch.setenv(name, value)
        return gpus.probe_gpus(None)

    return ask


def test_lanes_and_copies_of_two_gpus(libraries: Path) -> None:
    env = os.environ | {"LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-m", "sidp_runtime.cli", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    found = json.loads(done.stdout)["gpus"]
    assert found["nvlinks"] == [
        {"ordinal": 0, "lanes": 17, "gbps": pytest.approx(17 * 26.562)},
        {"ordinal": 1, "lanes": 0, "gbps": 0.0},
    ]
    rates = {(rate["src"], rate["dst"]): rate for rate in found["copies"]}
    assert [(pair, rate["direct"]) for pair, rate in rates.items()] == [((0, 1), False), ((1, 0), True)]
    # What the fake driver takes for a copy, or more on a busy machine
    assert 10 < rates[0, 1]["gbps"] <= 20
    assert 20 < rates[1, 0]["gbps"] <= 40
    assert (found["nvlinks_reason"], found["copies_reason"]) == ("", "")


def test_one_gpu_has_nothing_to_measure_between_gpus(probe: Any) -> None:
    found = probe(FAKE_CUDA_DEVICES="1")
    assert found.copies == []
    assert found.copies_reason == "one GPU: nothing to measure between GPUs"
    assert [gpu["lanes"] for gpu in found.nvlinks] == [17]


def test_what_fails_is_the_reason(probe: Any) -> None:
    found = probe(FAKE_NVML_INIT="9", FAKE_CUDA_FULL="1")
    assert "nvmlInit failed: Driver Not Loaded" in found.nvlinks_reason
    assert "cuMemAlloc of 64 MiB failed" in found.copies_reason
    assert "device 0" in found.copies_reason
    assert (found.nvlinks, found.copies) == ([], [])


def test_missing_nvml_is_named(probe: Any, libraries: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").symlink_to(libraries / "libcuda.so.1")
    found = probe(LD_LIBRARY_PATH=str(tmp_path), FAKE_CUDA_DEVICES="1")
    if found.nvlinks_reason == "":
        pytest.skip("this machine has an NVML")
    assert "libnvidia-ml.so.1 cannot be loaded" in found.nvlinks_reason


def test_driver_that_hangs_costs_the_deadline_and_the_rest_is_told(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DEADLINE_S", 3.0)
    start = time.monotonic()
    found = probe(FAKE_CUDA_HANG="1")
    assert time.monotonic() - start < 6
    assert found.copies_reason == "the driver did not answer within 3 s"
    assert [gpu["lanes"] for gpu in found.nvlinks] == [17, 0]


def test_child_that_dies_is_the_reason(probe: Any) -> None:
    found = probe(FAKE_NVML_INIT="-1")
    assert found.nvlinks_reason == found.copies_reason
    assert "ended with status -6" in found.nvlinks_reason


def test_nvshmem_says_its_version(tmp_path: Path) -> None:
    source, library = tmp_path / "nvshmem.c", tmp_path / "libnvshmem_host.so.3"
    source.write_text(
        "void nvshmemx_vendor_get_version_info(int* a, int* b, int* c) { *a = 3; *b = 4; *c = 5; }\n", encoding="ascii"
    )
    compile_library(source, library)
    assert gpu_probe.nvshmem_version(str(library)) == "3.4.5"
    assert gpu_probe.nvshmem_version(str(tmp_path / "none.so")) is None


def test_render_shows_lanes_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {
        "name": "Fake GPU",
        "uuid": "GPU-0",
        "memory_bytes": 80 << 30,
        "compute_capability": (9, 0),
        "num_sms": 132,
        "num_async_engines": 3,
        "stream_mem_ops_64bit": True,
        "can_access_peer": [True, True],
    }
    devices = [device | {"ordinal": i} for i in range(3)]
    cuda = {"compiled": True, "compiled_version": "13.0", "driver": "13.1", "reason": "", "devices": devices}
    found = doctor.GpuProbe(
        nvlinks=[{"ordinal": 0, "lanes": 18, "gbps": 18 * 26.562}, {"ordinal": 1, "lanes": 0, "gbps": 0.0}],
        nvlinks_reason="",
        copies=[
            {"src": 0, "dst": 1, "direct": True, "gbps": 385.4},
            {"src": 1, "dst": 0, "direct": False, "gbps": 11.6},
        ],
        copies_reason="",
        nvshmem_version="3.4.5",
    )
    monkeypatch.setattr(doctor, "measure_memcpy_gbps", lambda: 12.5)
    monkeypatch.setattr(doctor, "_extension", lambda: (doctor.ExtensionInfo("_C.so", ""), cuda))
    monkeypatch.setattr(doctor, "probe_gpus", lambda library: found)
    report = doctor.report()
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=200))
    text = out.getvalue()
    assert report.nvshmem.library_version == "3.4.5"
    for words in ("18 of 26.6 GB/s each way", "none", "not known", "385", "12 *", "* not mapped: through host"):
        assert words in text
