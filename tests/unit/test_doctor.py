"""sidp doctor: plain data on any machine, and each thing that is missing is named with what to do."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sidp_runtime import _C, doctor

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _quick_memcpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_memcpy_gbps", lambda: 12.5)


def rendered(report: doctor.DoctorReport) -> str:
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=200))
    return out.getvalue()


def errors(report: doctor.DoctorReport) -> list[str]:
    return [finding.what for finding in report.findings if finding.level == "error"]


def test_this_machine_can_run_the_host_backend() -> None:
    report = doctor.report()
    assert report.exit_code == 0
    assert report.extension.error == ""
    backends = {backend.name: backend for backend in report.backends}
    assert backends["host"].available
    assert backends["nvshmem"].available == (backends["nvshmem"].reason == "")
    if not _C.cuda_report()["devices"]:
        assert "a usable GPU" in backends["nvshmem"].reason
    assert ("the GPU backend in this build" in backends["nvshmem"].reason) == ("nvshmem" not in _C.backend_names())
    assert report.machine.cores >= 1
    assert 0 < report.machine.memory_available_bytes <= report.machine.memory_bytes


def test_report_survives_json() -> None:
    report = doctor.report()
    again = json.loads(json.dumps(report.as_dict()))
    assert again["machine"]["memcpy_gbps"] == 12.5
    assert again["packages"]["torch"] == report.packages["torch"]


def test_render_shows_the_rows_people_look_for() -> None:
    text = rendered(doctor.report())
    for word in ("Python", "torch", "/dev/shm", "12.5 GB/s", "GPUs", "NVSHMEM", "host", "not needed"):
        assert word in text


def test_render_shows_devices_and_their_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    device: dict[str, Any] = {
        "name": "Fake GPU [odd]",  # must not be read as markup
        "uuid": "GPU-0",
        "memory_bytes": 80 << 30,
        "compute_capability": (9, 0),
        "num_sms": 132,
        "num_async_engines": 3,
        "stream_mem_ops_64bit": True,
        "stream_wait_value_nor": True,
        "flush_remote_writes": False,
    }
    devices = [
        device | {"ordinal": 0, "can_access_peer": [True, True]},
        device | {"ordinal": 1, "can_access_peer": [False, True]},
    ]
    cuda = {"compiled": True, "compiled_version": "13.0", "driver": "13.1", "reason": "", "devices": devices}
    probe = doctor.GpuProbe([], "no NVML here", [], "one GPU: nothing to measure", None)
    monkeypatch.setattr(doctor, "_extension", lambda: (doctor.ExtensionInfo("_C.so", ""), cuda))
    monkeypatch.setattr(doctor, "probe_gpus", lambda library: probe)
    report = doctor.report()
    text = rendered(report)
    assert "Fake GPU [odd]" in text
    assert "80.0 GiB" in text
    assert "no peer" in text
    assert "no NVML here" in text
    assert "one GPU: nothing to measure" in text
    assert "a usable GPU" not in report.backends[1].reason


def test_small_shared_memory_is_a_warning_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_shm_bytes", lambda: (64 << 20, 60 << 20))
    report = doctor.report()
    assert report.exit_code == 0
    (finding,) = report.findings
    assert finding.level == "warning"
    assert "60 MiB free of 64 MiB" in finding.what
    assert "--shm-size" in finding.do
    assert "--shm-size" in rendered(report)


def test_missing_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "SHM_DIR", tmp_path / "none")
    report = doctor.report()
    assert report.exit_code == 1
    assert report.machine.shm_bytes is None
    assert "missing or not writable" in errors(report)[0]
    assert "missing" in rendered(report)


def test_extension_that_does_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol: oops")

    monkeypatch.setattr(importlib, "import_module", broken)
    report = doctor.report()
    assert report.exit_code == 1
    assert "undefined symbol: oops" in errors(report)[0]
    assert report.cuda.report is None
    assert "undefined symbol: oops" in rendered(report)


def test_only_a_missing_required_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda n: None if n in ("torch", "gguf") else real(n))
    report = doctor.report()
    assert errors(report) == ["torch is not installed"]
    assert report.packages["gguf"] is None
    assert "not installed (GGUF checkpoints)" in rendered(report)


def test_container_limits_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 27}\n")
    monkeypatch.setattr(doctor, "CGROUP_DIR", tmp_path)
    machine = doctor.report().machine
    assert machine.cpu_quota == 1.5
    assert machine.memory_bytes == 1 << 28
    assert machine.memory_available_bytes == 1 << 27


def test_unlimited_container_has_no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(doctor, "CGROUP_DIR", tmp_path)
    assert doctor.report().machine.cpu_quota is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 2025", "580.95.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159  Release Build\nGCC 12",
            "580.159",
        ),
        ("something else", None),
    ],
)
def test_kernel_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str | None) -> None:
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(doctor, "NVIDIA_PROC_FILE", file)
    assert doctor.report().cuda.kernel_driver == version


def test_nvshmem_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libnvshmem_host.so.3"
    library.touch()
    (tmp_path / "nvshmem").mkdir()
    (tmp_path / "nvshmem" / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "NVSHMEM_DIRS", (str(tmp_path),))
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    nvshmem = doctor.report().nvshmem
    assert nvshmem.library is not None
    assert nvshmem.nvshmem4py_version is not None
    assert nvshmem.disable_nvls == "1"
    assert "nvshmem" not in sys.modules


def test_doctor_imports_no_nvshmem_and_starts_nothing() -> None:
    code = "import sys, sidp_runtime.doctor as d; d.report(); sys.exit('nvshmem' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_memcpy_rate_is_in_gigabytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0.1 < doctor.measure_memcpy_gbps(num_bytes=1 << 20, repeats=2) < 1000
