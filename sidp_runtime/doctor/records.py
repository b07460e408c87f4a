"""What a report consists of: plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .gpus import GpuProbe

#: Distribution -> why it is of use. The first two are needed by everything.
PACKAGES = {
    "torch": "tensors",
    "numpy": "loading",
    "safetensors": "checkpoints",
    "transformers": "sidp generate",
    "accelerate": "sidp generate",
    "gguf": "GGUF checkpoints",
}
REQUIRED_PACKAGES = ("torch", "numpy")


@dataclass(frozen=True)
class Finding:
    """Something that stands in the way: ``level`` is "error" (host backend unusable) or "warning"."""

    level: str
    what: str
    do: str


@dataclass(frozen=True)
class ExtensionInfo:
    """The compiled module: its file and backends, or the reason why it does not import."""

    file: str | None
    error: str
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineInfo:
    """Cores and bytes that this process may use, limits of its container included."""

    system: str
    cores: int
    cpu_quota: float | None  # cores' worth of time a container may use; None: no limit
    memory_bytes: int
    memory_available_bytes: int
    shm_bytes: int | None  # None: no /dev/shm
    shm_free_bytes: int | None
    memcpy_gbps: float  # one thread, GB/s of bytes copied (each is read once and written once)


@dataclass(frozen=True)
class CudaInfo:
    """``report`` is ``_C.cuda_report()`` (None without the module); ``kernel_driver`` e.g. "580.95.05"."""

    report: dict[str, Any] | None
    kernel_driver: str | None


@dataclass(frozen=True)
class NvshmemInfo:
    """NVSHMEM as found on disk; nothing of it is imported or loaded."""

    library: str | None
    library_version: str | None  # as the library says where there is a GPU, else of the pip package that ships it
    nvshmem4py_version: str | None
    disable_nvls: str | None  # NVSHMEM_DISABLE_NVLS as set for this process


@dataclass(frozen=True)
class BackendInfo:
    """A backend, and why it cannot be used ("" when it can)."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True)
class DoctorReport:
    """All of it as plain data."""

    version: str
    python: str
    packages: dict[str, str | None]  # None: not installed
    extension: ExtensionInfo
    machine: MachineInfo
    cuda: CudaInfo
    nvshmem: NvshmemInfo
    gpus: GpuProbe | None  # None: there is no GPU to ask
    backends: list[BackendInfo]
    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """0 when the host backend can be used, else 1."""
        return 0 if any(b.name == "host" and b.available for b in self.backends) else 1

    def as_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and plain values that ``json.dumps`` takes."""
        return asdict(self)
