"""What this machine can do, what is missing, and what to do about it (``sidp doctor``).

``report()`` only looks: it imports neither torch nor NVSHMEM, starts no backend and changes nothing. It does
initialise the CUDA driver if there is one, so a process forked from this one afterwards cannot use CUDA. What starts
CUDA on the GPUs, or may hang, is asked by a child process with a deadline (``gpus.py``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .. import config
from .display import bytes_text, render
from .gpus import GpuProbe, probe_gpus
from .records import (
    PACKAGES,
    REQUIRED_PACKAGES,
    BackendInfo,
    CudaInfo,
    DoctorReport,
    ExtensionInfo,
    Finding,
    MachineInfo,
    NvshmemInfo,
)

__all__ = [
    "BackendInfo",
    "CudaInfo",
    "DoctorReport",
    "ExtensionInfo",
    "Finding",
    "GpuProbe",
    "MachineInfo",
    "NvshmemInfo",
    "render",
    "report",
]

#: /dev/shm below this many bytes holds no useful pool; Docker's default is 64 MiB.
SMALL_SHM_BYTES = 1 << 30

SHM_DIR = Path("/dev/shm")
CGROUP_DIR = Path("/sys/fs/cgroup")
NVIDIA_PROC_FILE = Path("/proc/driver/nvidia/version")
NVSHMEM_LIBRARY = "libnvshmem_host.so"
NVSHMEM_DIRS = (
    "/usr/lib/*-linux-gnu",
    "/usr/lib/*-linux-gnu/nvshmem/*",
    "/usr/local/nvshmem/lib",
    "/opt/nvshmem/lib",
)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> tuple[ExtensionInfo, dict[str, Any] | None]:
    """The compiled module and its CUDA report; any failure to import is the finding itself."""
    try:
        module = importlib.import_module("sidp_runtime._C")
    except ImportError as error:
        return ExtensionInfo(file=None, error=str(error)), None
    return ExtensionInfo(module.__file__, "", tuple(module.backend_names())), module.cuda_report()


def _read_text(path: Path) -> str | None:
    """Content of a small kernel file, or None where this kernel or container has no such file."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _cpu_quota() -> float | None:
    text = _read_text(CGROUP_DIR / "cpu.max")  # "<quota> <period>" in microseconds, or "max <period>"
    if text is None or text.startswith("max"):
        return None
    quota, period = text.split()
    return int(quota) / int(period)


def _memory_bytes() -> tuple[int, int]:
    """Total and available bytes, as the container's limit allows."""
    memory = psutil.virtual_memory()
    limit, used = _read_text(CGROUP_DIR / "memory.max"), _read_text(CGROUP_DIR / "memory.current")
    if limit is None or used is None or limit == "max":
        return memory.total, memory.available
    return min(memory.total, int(limit)), min(memory.available, max(0, int(limit) - int(used)))


def _shm_bytes() -> tuple[int, int] | None:
    """Total and free bytes of /dev/shm, or None when it is not there or not writable."""
    if not (SHM_DIR.is_dir() and os.access(SHM_DIR, os.W_OK)):
        return None
    usage = shutil.disk_usage(SHM_DIR)
    return usage.total, usage.free


def measure_memcpy_gbps(num_bytes: int = 64 << 20, repeats: int = 5) -> float:
    """Best of ``repeats`` copies of ``num_bytes`` by one thread, in GB/s of bytes copied."""
    source = np.ones(num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)  # zeros_like maps lazily: the first copy below pays the page faults
    np.copyto(target, source)
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        best_s = min(best_s, time.perf_counter() - start)
    return num_bytes / best_s / 1e9


def _machine(shm: tuple[int, int] | None) -> MachineInfo:
    total, available = _memory_bytes()
    return MachineInfo(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        cpu_quota=_cpu_quota(),
        memory_bytes=total,
        memory_available_bytes=available,
        shm_bytes=shm[0] if shm else None,
        shm_free_bytes=shm[1] if shm else None,
        memcpy_gbps=measure_memcpy_gbps(),
    )


def _kernel_driver() -> str | None:
    text = _read_text(NVIDIA_PROC_FILE) or ""
    found = re.search(r"Kernel Module\D*?\s(\d+(?:\.\d+)+)\s", text.replace("x86_64", ""))
    return found.group(1) if found else None


def _nvshmem() -> NvshmemInfo:
    library = version = None
    for name in ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12"):
        if library is None and (version := installed_version(name)) is not None:
            files = importlib.metadata.files(name) or []
            found = [file.locate() for file in files if file.name.startswith(NVSHMEM_LIBRARY)]
            library = str(found[0]) if found else None
    if library is None:
        installed = [p for d in NVSHMEM_DIRS for p in Path("/").glob(f"{d.lstrip('/')}/{NVSHMEM_LIBRARY}*")]
        library = str(min(installed)) if installed else None
    versions = (installed_version(name) for name in ("nvshmem4py-cu13", "nvshmem4py-cu12"))
    bindings = next((v for v in versions if v is not None), None)
    if bindings is None and importlib.util.find_spec("nvshmem") is not None:
        bindings = "unknown version"
    return NvshmemInfo(library, version, bindings, config.nvshmem_disable_nvls())


def _nvshmem_reason(cuda: CudaInfo, nvshmem: NvshmemInfo, in_build: bool) -> str:
    """What stands between this machine and the GPU backend; "" when nothing does."""
    missing = [] if in_build else ["the GPU backend in this build (SIDP_WITH_CUDA=ON with a CUDA toolkit)"]
    if cuda.report is None or cuda.report["reason"]:
        missing.append("a usable GPU")
    if nvshmem.library is None:
        missing.append(NVSHMEM_LIBRARY)
    if nvshmem.nvshmem4py_version is None:
        missing.append("nvshmem4py")
    return f"missing: {', '.join(missing)}" if missing else ""


def _findings(extension: ExtensionInfo, packages: dict[str, str | None], shm: tuple[int, int] | None) -> list[Finding]:
    findings = []
    if extension.error:
        findings.append(
            Finding(
                "error",
                f"sidp_runtime._C does not import: {extension.error}",
                "pip install . (needs a C++20 compiler)",
            )
        )
    for name in REQUIRED_PACKAGES:
        if packages[name] is None:
            findings.append(Finding("error", f"{name} is not installed", f"pip install {name}"))
    if shm is None:
        findings.append(
            Finding(
                "error",
                f"{SHM_DIR} is missing or not writable; the host backend keeps its pool there",
                "mount a tmpfs at /dev/shm with mode 1777",
            )
        )
    elif shm[1] < SMALL_SHM_BYTES:
        total, free = (bytes_text(n) for n in shm)
        findings.append(
            Finding(
                "warning",
                f"{SHM_DIR} has {free} free of {total}; the weights of all ranks must fit",
                "docker run --shm-size=16g or --ipc=host; elsewhere mount -o remount,size=16g /dev/shm",
            )
        )
    return findings


def report() -> DoctorReport:
    """Look at this machine; never raises for what is missing.

    Takes about a third of a second; with GPUs a second of copies more and the start of CUDA on each of them, 20 s at
    the most.
    """
    packages = {name: installed_version(name) for name in PACKAGES}
    extension, cuda_report = _extension()
    shm = _shm_bytes()
    findings = _findings(extension, packages, shm)
    errors = "; ".join(finding.what for finding in findings if finding.level == "error")
    cuda = CudaInfo(cuda_report, _kernel_driver())
    nvshmem = _nvshmem()
    gpus = probe_gpus(nvshmem.library) if cuda_report is not None and cuda_report["devices"] else None
    if gpus is not None and gpus.nvshmem_version is not None:
        nvshmem = replace(nvshmem, library_version=gpus.nvshmem_version)
    gpu_reason = _nvshmem_reason(cuda, nvshmem, "nvshmem" in extension.backends)
    return DoctorReport(
        version=installed_version("sidp_runtime") or "not installed",
        python=platform.python_version(),
        packages=packages,
        extension=extension,
        machine=_machine(shm),
        cuda=cuda,
        nvshmem=nvshmem,
        gpus=gpus,
        backends=[
            BackendInfo("host", not errors, errors),
            BackendInfo("nvshmem", not gpu_reason, gpu_reason),
        ],
        findings=findings,
    )
