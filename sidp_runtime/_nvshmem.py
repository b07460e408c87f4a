"""NVSHMEM's start in this process: by nvshmem4py, from a unique id that travels through the group's store."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import _C, config
from .errors import ConfigError, DeadlineError, DeviceError, UnsupportedError

if TYPE_CHECKING:
    from .group import Group

# NVSHMEM is initialised once in a process: (rank, world_size, device) of its job, or why it failed.
_job: tuple[int, int, int] | None = None
_failed: str | None = None


def missing() -> str | None:
    """What this machine or process lacks for backend "nvshmem", in words; None if nothing."""
    if "nvshmem" not in _C.backend_names():
        return "this build has no GPU backend; build with a CUDA toolkit and SIDP_WITH_CUDA=ON"
    if reason := _C.cuda_report()["reason"]:
        return str(reason)
    if find_spec("nvshmem") is None:
        return "nvshmem4py is not installed: pip install nvshmem4py-cu13 (or -cu12, as torch's CUDA is)"
    return None


def check_sharing(gpus: Sequence[str]) -> None:
    """``ConfigError`` unless each GPU has equally many ranks. ``gpus``: UUIDs by rank.

    NVSHMEM 3 decides in each rank alone whether it takes the collective path of shared GPUs (``is_mpg_run`` in its
    ``init.cu``), so that ranks that share wait for ever for one that does not.
    """
    counts = Counter(gpus)
    if len(set(counts.values())) > 1:
        uneven = ", ".join(f"{gpu}: {count}" for gpu, count in counts.items())
        raise ConfigError(
            f"NVSHMEM needs equally many ranks on each GPU, and {len(gpus)} ranks lie on {len(counts)} ({uneven}); "
            "give each rank a GPU of its own, or all of them the same"
        )


def visible_ordinals(devices: Sequence[Mapping[str, Any]], gpus: Sequence[str]) -> list[int]:
    """Of GPUs by UUID, their ordinals in this process, whose devices are those; -1: not visible to it."""
    ordinals = {device["uuid"]: device["ordinal"] for device in devices}
    return [ordinals.get(gpu, -1) for gpu in gpus]


def initialise(group: Group, device: int | None) -> tuple[int, list[str], list[int]]:
    """Starts NVSHMEM for the ranks of a group. Collective.

    Returns the ordinal of this rank's GPU, and by rank the UUIDs of all and their ordinals here (-1: not visible).

    Raises ``UnsupportedError`` if something is missing, ``ConfigError`` if the process belongs to another NVSHMEM job,
    ``DeadlineError``.
    """
    global _job, _failed
    from . import _torch_gpu

    if not _torch_gpu.has_started():
        config.load_kernels_early()  # before anything starts CUDA, as the next line may
    if reason := missing():
        raise UnsupportedError(f"backend 'nvshmem': {reason}", rank=group.rank)
    if _failed:
        raise DeviceError(f"NVSHMEM failed in this process before: {_failed}; start a new one", rank=group.rank)
    config.prepare_nvshmem()
    device = _torch_gpu.use_device(device)
    job = (group.rank, group.world_size, device)
    devices = _C.cuda_report()["devices"]
    gpus = [gpu.decode() for gpu in group.all_gather("nvshmem/gpus", str(devices[device]["uuid"]).encode())]
    ordinals = visible_ordinals(devices, gpus)
    check_sharing(gpus)
    # One rank with a process of its own and others with a used one would wait for each other in NVSHMEM.
    started = group.all_gather("nvshmem/started", str(int(_job is not None)).encode())
    if len(set(started)) != 1 or _job not in (None, job):
        raise ConfigError(
            f"NVSHMEM runs in some of the processes, here as (rank, world_size, device) {_job}, and this group needs "
            f"{job}; a process takes part in one NVSHMEM job, so start all ranks anew",
            rank=group.rank,
        )
    if _job is not None:
        return device, gpus, ordinals
    import nvshmem.core
    from cuda.core import Device

    uid = nvshmem.core.get_unique_id(empty=group.rank != 0)
    data = uid._data.view("uint8")
    raw = group.all_gather("nvshmem/uid", data.tobytes() if group.rank == 0 else b"")[0]
    data.reshape(-1)[:] = list(raw)
    over = threading.Event()
    errors: list[Exception] = []

    def start() -> None:
        try:
            gpu = Device(device)
            gpu.set_current()
            nvshmem.core.init(device=gpu, uid=uid, rank=group.rank, nranks=group.world_size, initializer_method="uid")
        except Exception as error:  # whatever NVSHMEM says
            errors.append(error)
        over.set()

    threading.Thread(target=start, daemon=True).start()
    if not over.wait(group.deadline_ms / 1000):
        _failed = f"its start took more than {group.deadline_ms} ms"
        raise DeadlineError(
            f"rank {group.rank} waited {group.deadline_ms} ms for NVSHMEM to start; a rank died or cannot reach the "
            "others; set NVSHMEM_DEBUG=INFO and look at what it prints",
            rank=group.rank,
            waited_ms=group.deadline_ms,
        )
    if errors:
        _failed = str(errors[0])
        raise DeviceError(f"NVSHMEM did not start on device {device}: {errors[0]}", rank=group.rank) from errors[0]
    _job = job
    return device, gpus, ordinals


def version() -> str:
    """Version of the NVSHMEM library that nvshmem4py finds."""
    import nvshmem.core

    return str(nvshmem.core.get_version().libnvshmem_version)
