"""Mode policy: WaS or CaS for each step, from measured times, with hysteresis and a reason for each decision."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _C, config
from ._C import Mode
from .errors import ConfigError

_PROFILE_VERSION = 1


@dataclass(frozen=True)
class MachineProfile:
    """What a machine does. All rates above 0.

    ``copy_bytes_per_s``: one lane, peer to local. ``round_trip_us``: an empty request and its reply.
    ``memory_bytes_per_s``: weights through a matrix product of one row. ``flops_per_s``: a product of many rows.
    """

    copy_bytes_per_s: float
    round_trip_us: float
    memory_bytes_per_s: float
    flops_per_s: float

    def core(self) -> _C.MachineProfile:
        return _C.MachineProfile(**asdict(self))

    @classmethod
    def measure(cls, device: int | None = None) -> MachineProfile:
        """Measures in about a second: on the host with one thread's copies, else on a GPU with its copy engine.

        A GPU's copies come from another GPU that this process sees, or from its own memory where there is none.
        """
        if device is not None:
            from . import _torch_gpu

            return cls(**_torch_gpu.measure(device))
        import numpy as np  # only here: it takes a tenth of a second

        source = np.ones(64 << 20, dtype=np.uint8)
        target = np.empty_like(source)
        weights = np.ones((4096, 2048), dtype=np.float32)
        row = np.ones(2048, dtype=np.float32)
        rows = np.ones((2048, 256), dtype=np.float32)
        return cls(
            copy_bytes_per_s=source.nbytes / _fastest(lambda: np.copyto(target, source)),
            round_trip_us=_C.measure_round_trip_us(500),
            memory_bytes_per_s=weights.nbytes / _fastest(lambda: weights @ row),
            flops_per_s=2.0 * weights.size * rows.shape[1] / _fastest(lambda: weights @ rows),
        )


def _fastest(call: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _profile_path(device: int | None) -> Path:
    return config.cache_dir() / f"profile-{'host' if device is None else f'gpu{device}'}.json"


def _machine_key(device: int | None) -> dict[str, object]:
    report = None if device is None else _C.cuda_report()
    return {
        "gpus": None if report is None else [gpu["uuid"] for gpu in report["devices"]],
        "driver": None if report is None else report["driver"],
        "version": _PROFILE_VERSION,
        "machine": platform.machine(),
        "node": platform.node(),
        "cores": os.cpu_count(),
    }


@dataclass(frozen=True)
class ModePolicy:
    """Chooses a mode when a step begins: the one that the estimates call faster.

    ``fixed``: always this mode. ``hysteresis``: share by which the other mode must be faster to be chosen, in [0, 1).
    Estimates are the measured times of recent steps of about the same size, or the profile's prediction
    (``include/sidp/mode_policy.hpp`` has the formulas) where none ran yet.
    """

    profile: MachineProfile
    fixed: Mode | None = None
    hysteresis: float = 0.10

    def __post_init__(self) -> None:
        if not 0 <= self.hysteresis < 1:
            raise ConfigError(f"hysteresis is {self.hysteresis}, must be in [0, 1)")

    @classmethod
    def calibrated(
        cls, *, fixed: Mode | None = None, hysteresis: float = 0.10, device: int | None = None
    ) -> ModePolicy:
        """A policy from this machine's profile, which is measured once and kept in the cache folder.

        ``device``: ordinal of the GPU that the pool lies on; None: the host.
        """
        path = _profile_path(device)
        try:
            stored = json.loads(path.read_text())
            if stored.pop("key") == _machine_key(device):
                profile = MachineProfile(**stored)
                if all(0 < rate < float("inf") for rate in asdict(profile).values()):
                    return cls(profile, fixed, hysteresis)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, of another version, or damaged: measure
        profile = MachineProfile.measure(device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps({"key": _machine_key(device), **asdict(profile)}, indent=1))
            scratch.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}; set SIDP_CACHE_DIR to a folder that can be") from error
        return cls(profile, fixed, hysteresis)
