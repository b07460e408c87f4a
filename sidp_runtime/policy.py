"""Mode policy: WaS or CaS for each step, from a profile and measured times, with hysteresis and a reason in words."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import _C, config, machine_profile
from ._C import Mode
from .errors import ConfigError, DoubtfulProfileWarning
from .machine_profile import MachineProfile

if TYPE_CHECKING:
    from .weight_pool import WeightPool

LARGEST_STEP = 8192  # tokens; engines seldom schedule more
DOUBTFUL_BELOW = 0.5  # of the rates that this GPU is known for
HELPFUL_WITHIN = 0.10  # a step that is slower than plain DP's by no more is not held against a configuration


@dataclass(frozen=True)
class ModePolicy:
    """Chooses a mode when a step begins: the one that the estimates call faster.

    An estimate is the profile's prediction (``docs/model.md``) times what recent steps of that mode and about that size
    took of theirs, once three were timed. ``hysteresis``: share by which the other mode must be faster to be chosen, in
    [0, 1); it grows where the mode changes often. A mode that its measurements
    rule out is tried again after 100 steps of a size, each time after twice as many, for three steps, and only if it
    looks faster as predicted, or corrected as the other one is.

    ``fixed``: always this mode; or a mode for each captured batch size, where a step takes that of the first size which
    holds it, and beyond the last the policy decides. ``Runtime.predicted_modes`` gives such a table.
    """

    profile: MachineProfile
    fixed: Mode | Mapping[int, Mode] | None = None
    hysteresis: float = 0.10

    def __post_init__(self) -> None:
        if not 0 <= self.hysteresis < 1:
            raise ConfigError(f"hysteresis is {self.hysteresis}, must be in [0, 1)")
        if isinstance(self.fixed, Mapping) and not self.fixed:
            raise ConfigError("fixed has no batch size; pass None to let the policy decide")

    @property
    def fixed_mode(self) -> Mode | None:
        return None if isinstance(self.fixed, Mapping) else self.fixed

    @property
    def fixed_sizes(self) -> list[tuple[int, Mode]]:
        return sorted(self.fixed.items()) if isinstance(self.fixed, Mapping) else []

    @classmethod
    def calibrated(
        cls,
        *,
        fixed: Mode | Mapping[int, Mode] | None = None,
        hysteresis: float = 0.10,
        device: int | None = None,
        pool: WeightPool | None = None,
    ) -> ModePolicy:
        """A policy from this machine's profile: what ``sidp calibrate`` stored, else a shorter measurement, stored too.

        ``device``: ordinal of the GPU that the pool lies on; None: the host. ``pool``: the link is measured through its
        peer mapping where no profile has it, and nothing else of a profile anew. A stored profile of another machine,
        other versions or another schema, or a damaged one, is measured again. ``ConfigError`` if a link can be neither
        measured nor looked up, ``CapacityError`` if the GPU has no room to measure. With one mode ``fixed`` there is
        nothing to choose: without a stored profile a GPU that is known has its link measured alone, and nothing stored.

        Of a GPU whose rates are known, a short measurement of less than half of one, as on a busy GPU, is made twice,
        used with a ``DoubtfulProfileWarning`` and not stored. What ``sidp calibrate`` measured is not doubted.
        """
        path = cache_path(device)
        profile = _stored(path, device)
        if profile is None and isinstance(fixed, Mode) and (known := _known_rates(device)) is not None:
            marked = replace(known, assumed=("round_trip_us", "request_bytes_per_s", "copy_bytes_per_s"))
            profile = _with_link(marked, device, pool)
            _warn_of(doubts(profile, device), path)
        elif profile is None:
            profile = _less_doubtful(lambda: measure(device, pool), device)
            key = machine_profile.machine_key(device)
            source = "in short, by the first process that needed it; `sidp calibrate` measures with two ranks"
            if not _warn_of(doubts(profile, device), path):
                machine_profile.write(path, machine_profile.document(profile, key, memory_bytes(device), source))
        elif pool is not None and "copy_bytes_per_s" in profile.assumed:
            known = profile
            profile = _with_link(known, device, pool)
            if profile is not known and not _warn_of(doubts(profile, device), path):  # the rest was measured, and stays
                machine_profile.amend(path, profile, "the link later, through a pool")
        return cls(profile, fixed, hysteresis)

    @classmethod
    def calibrated_in_turns(cls, pool: WeightPool, *, fixed: Mode | Mapping[int, Mode] | None = None) -> ModePolicy:
        """``calibrated``, one rank after the other, as ``Group.in_turns``. Collective."""
        group = pool.group
        return group.in_turns(lambda: cls.calibrated(fixed=fixed, device=group.device, pool=pool))

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        fixed: Mode | Mapping[int, Mode] | None = None,
        hysteresis: float = 0.10,
        device: int | None = None,
    ) -> ModePolicy:
        """A policy from what ``sidp calibrate --out`` wrote. ``ConfigError`` says why a profile is not valid here."""
        return cls(machine_profile.read(Path(path), device), fixed, hysteresis)


def _less_doubtful(take: Callable[[], MachineProfile], device: int | None) -> MachineProfile:
    """What was measured; where that is to be doubted the better of two measurements."""
    first = take()
    if not doubts(first, device):
        return first
    return min(first, take(), key=lambda found: (len(doubts(found, device)), -found.copy_bytes_per_s))


def _with_link(profile: MachineProfile, device: int | None, pool: WeightPool | None) -> MachineProfile:
    """With its link measured, not assumed, and what requests are assumed to take by it; itself if that cannot be."""

    def measured() -> MachineProfile:
        link = measure_link(device, pool)
        if link is None:
            return profile
        assumed = tuple(name for name in profile.assumed if name != "copy_bytes_per_s")
        rows = profile.request_bytes_per_s
        if rows is not None and "request_bytes_per_s" in assumed:
            rows *= link / profile.copy_bytes_per_s
        return replace(profile, copy_bytes_per_s=link, request_bytes_per_s=rows, assumed=assumed)

    return _less_doubtful(measured, device)


def _stored(path: Path, device: int | None) -> MachineProfile | None:
    """None: none yet, of another machine or version, damaged, or a short measurement to be doubted."""
    try:
        profile = machine_profile.read(path, device)
    except ConfigError:
        return None
    short = profile.linear_times is None  # which `sidp calibrate` measures, and nothing else
    return None if short and doubts(profile, device) else profile


def doubts(profile: MachineProfile, device: int | None) -> list[str]:
    """The rates that are below half of those which this GPU is known for, in words. None of the host's are."""
    known = _known_rates(device)
    if known is None:
        return []
    return [
        f"{name} {rate / 1e9:.4g} GB/s, known {usual / 1e9:.4g}"
        for name in ("copy_bytes_per_s", "memory_bytes_per_s")
        if (rate := getattr(profile, name)) < DOUBTFUL_BELOW * (usual := getattr(known, name))
    ]


def _known_rates(device: int | None) -> MachineProfile | None:
    if device is None:
        return None
    from . import _torch_gpu

    return _torch_gpu.bundled_rates(device)


def _warn_of(found: list[str], path: Path) -> bool:
    if found:
        warnings.warn(
            f"measured far below what this GPU is known for, so it is not kept in {path}: {'; '.join(found)}. Another "
            "process may use the GPU, and what is predicted by it may be wrong: start again when it is free. "
            "If it is what this machine gives (a link over PCIe, a part of a GPU), run `sidp calibrate` once, whose "
            "profile is kept",
            DoubtfulProfileWarning,
            stacklevel=3,
        )
    return bool(found)


def cache_path(device: int | None) -> Path:
    """Where the profile of the host, or of a GPU, is kept."""
    name = "host" if device is None else machine_profile.machine_key(device)["uuid"]
    return cache_path_of(name)


def cache_path_of(name: str) -> Path:
    """The same by the GPU's UUID, or "host"."""
    return config.cache_dir() / f"profile-{name}.json"


def measure(device: int | None = None, pool: WeightPool | None = None) -> MachineProfile:
    """A profile in about a second, without other ranks. ``assumed`` names what could not be measured so.

    On the host: one thread's copies. On a GPU the link is measured through the pool's peer mapping or from another GPU
    that this process sees; else it is the bundled profile's of that GPU, and marked as assumed. Ranks that share a GPU
    have no link between them, and one without room for the bytes to copy is none to measure with.
    """
    if device is not None:
        from . import _torch_gpu

        return _torch_gpu.measure(device, pool)
    import numpy as np  # only here: it takes a tenth of a second

    source = np.ones(64 << 20, dtype=np.uint8)
    target = np.empty_like(source)
    weights = np.ones((4096, 2048), dtype=np.float32)
    row = np.ones(2048, dtype=np.float32)
    rows = np.ones((2048, 256), dtype=np.float32)
    return MachineProfile(
        copy_bytes_per_s=source.nbytes / _fastest(lambda: np.copyto(target, source)),
        round_trip_us=_C.measure_round_trip_us(500),
        memory_bytes_per_s=weights.nbytes / _fastest(lambda: weights @ row),
        flops_per_s=2.0 * weights.size * rows.shape[1] / _fastest(lambda: weights @ rows),
    )


def measure_link(device: int | None, pool: WeightPool | None) -> float | None:
    """``copy_bytes_per_s`` as ``measure`` takes it on a GPU; None if it cannot be measured, or on the host."""
    if device is None:
        return None
    from . import _torch_gpu

    return _torch_gpu.measure_link(device, pool)


def _fastest(call: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def memory_bytes(device: int | None) -> int:
    """Of the GPU, or of this machine."""
    if device is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_C.cuda_report()["devices"][device]["memory_bytes"])


def advice(core: _C.Runtime, policy: ModePolicy, max_rows: int, held_bytes: int, pooled_bytes: int) -> list[str]:
    """Why a configuration does not pay, with the figures; empty: it may.

    It saves no memory where a rank holds as many bytes as a full replica; it is slow where no step of up to 8192 tokens
    comes within 10 % of plain DP's in the better mode.
    """
    found = []
    if held_bytes >= pooled_bytes:
        found.append(
            f"this rank holds {held_bytes} bytes of layers and ring, a full replica {pooled_bytes}: sharing saves "
            "nothing here; use fewer ring slots or resident layers, or plain data parallelism"
        )
    worst = []
    for bit in range(LARGEST_STEP.bit_length()):
        tokens = 1 << bit
        times = core.predict(tokens)
        modes = {Mode.WAS: times.was_s} | ({Mode.CAS: times.cas_s} if tokens <= max_rows else {})
        if policy.fixed_mode is not None:
            modes = {policy.fixed_mode: {Mode.WAS: times.was_s, Mode.CAS: times.cas_s}[policy.fixed_mode]}
        mode, seconds = min(modes.items(), key=lambda item: item[1])
        if seconds <= (1 + HELPFUL_WITHIN) * times.local_s:
            return found
        worst.append(f"{tokens} tokens {seconds * 1e3:.3g} ms ({mode.name}) against {times.local_s * 1e3:.3g}")
    found.append(
        f"no step of up to {LARGEST_STEP} tokens is predicted within {HELPFUL_WITHIN:.0%} of plain data parallelism: "
        f"{worst[0]}, {worst[-1]}; it pays only if the memory gained is worth that. See `sidp plan`"
    )
    return found
