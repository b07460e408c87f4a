"""What a machine does: the one profile that mode policy, planner and ``sidp calibrate`` share, and its JSON file.

A file is an entry as ``planner/gpu_profiles.json`` has them, with the machine it was measured on and a schema number:
``sidp calibrate`` writes it, ``ModePolicy`` and ``sidp plan --gpu FILE`` read it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from . import _C
from .errors import ConfigError

SCHEMA = 3


@dataclass(frozen=True)
class LinearTimes:
    """Measured seconds of matrix products by rows, for ``num_bytes`` of weights. Rows ascend, seconds never fall."""

    num_bytes: int
    rows: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class MachineProfile:
    """Rates above 0.

    ``copy_bytes_per_s``: one lane, peer to local. ``round_trip_us``: a request of one row and its reply, without the
    op. ``memory_bytes_per_s``: weights through a matrix product of one row. ``flops_per_s``: a product of many rows.
    ``copy_latency_us``: what a copy costs besides its bytes. ``request_bytes_per_s``: many rows there and, then, back;
    None: as copies. ``linear_times``: measured products; None: the longer of reading the weights and multiplying them.
    ``assumed``: figures that were not measured as the runtime uses them.
    """

    copy_bytes_per_s: float
    round_trip_us: float
    memory_bytes_per_s: float
    flops_per_s: float
    copy_latency_us: float = 0.0
    request_bytes_per_s: float | None = None
    linear_times: LinearTimes | None = None
    assumed: tuple[str, ...] = ()

    @cached_property
    def core(self) -> _C.MachineProfile:
        """The same for the C++ side; ``ConfigError`` for a rate that is not above 0 or times that fall."""
        times = self.linear_times
        products = (
            [] if times is None else [(r, s / times.num_bytes) for r, s in zip(times.rows, times.seconds, strict=True)]
        )
        core = _C.MachineProfile(
            copy_bytes_per_s=self.copy_bytes_per_s,
            round_trip_us=self.round_trip_us,
            memory_bytes_per_s=self.memory_bytes_per_s,
            flops_per_s=self.flops_per_s,
            copy_latency_us=self.copy_latency_us,
            request_bytes_per_s=0.0 if self.request_bytes_per_s is None else self.request_bytes_per_s,
            products=products,
        )
        _C.check_policy(core)
        return core

    def linears_s(self, num_bytes: float, rows: float, element_bytes: int = 2) -> float:
        """Seconds of products of ``rows`` rows with ``num_bytes`` of weights; 0 rows take no time."""
        return _C.products_s(num_bytes, rows, self.core, element_bytes)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> MachineProfile:
        """From the ``measured`` part of a profile; ``ConfigError`` names what is missing, too much or not above 0."""
        try:
            linears = facts.get("linears")
            profile = cls(
                copy_bytes_per_s=number(facts, "copy_gbps") * 1e9,
                round_trip_us=number(facts, "round_trip_us"),
                memory_bytes_per_s=number(facts, "memory_gbps") * 1e9,
                flops_per_s=number(facts, "tflops") * 1e12,
                copy_latency_us=number(facts, "copy_latency_us") if facts.get("copy_latency_us") else 0.0,
                request_bytes_per_s=number(facts, "request_gbps") * 1e9 if "request_gbps" in facts else None,
                linear_times=None if linears is None else _linear_times(linears),
                assumed=tuple(map(str, facts.get("assumed", ()))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"machine profile: {type(error).__name__} {error}; compare gpu_profiles.json") from error
        profile.core  # noqa: B018 - the C++ side's checks
        return profile

    def facts(self) -> dict[str, Any]:
        """What ``from_facts`` reads."""
        facts: dict[str, Any] = {
            "copy_gbps": self.copy_bytes_per_s / 1e9,
            "copy_latency_us": self.copy_latency_us,
            "round_trip_us": self.round_trip_us,
            "memory_gbps": self.memory_bytes_per_s / 1e9,
            "tflops": self.flops_per_s / 1e12,
            "assumed": list(self.assumed),
        }
        if self.request_bytes_per_s is not None:
            facts["request_gbps"] = self.request_bytes_per_s / 1e9
        if (times := self.linear_times) is not None:
            facts["linears"] = {
                "num_bytes": times.num_bytes,
                "rows": list(times.rows),
                "ms": [seconds * 1e3 for seconds in times.seconds],
            }
        return facts


def number(facts: Mapping[str, Any], key: str) -> float:
    """A finite number above 0, or ``ConfigError``."""
    return positive(key, facts[key])


def positive(key: str, value: object) -> float:
    """The value as a finite number above 0, or ``ConfigError``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"machine profile: {key} is {value!r}, must be a number above 0")
    return float(value)


def whole(key: str, value: object) -> int:
    """The value as an integer of at least 1, or ``ConfigError``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"machine profile: {key} is {value!r}, must be an integer of at least 1")
    return value


def _linear_times(facts: Mapping[str, Any]) -> LinearTimes:
    times = LinearTimes(
        whole("linears num_bytes", facts["num_bytes"]),
        tuple(whole("linears rows", rows) for rows in facts["rows"]),
        tuple(positive("linears ms", ms) / 1e3 for ms in facts["ms"]),
    )
    rising = list(times.rows) == sorted(set(times.rows)) and list(times.seconds) == sorted(times.seconds)
    if not rising or len(times.rows) != len(times.seconds) or not times.rows:
        raise ConfigError("machine profile: linears needs rows that ascend and a time for each that never falls")
    return times


# --- The file -------------------------------------------------------------------------------------------------------


def machine_key(device: int | None) -> dict[str, Any]:
    """What a profile is valid for: GPUs by UUID, or the processor; and the software that ran.

    ``device``: ordinal of a GPU, whose key names all visible GPUs of its kind; None: the host.
    """
    from . import __version__

    key: dict[str, Any] = {"package": __version__, "torch": _version("torch")}
    if device is None:
        return {"backend": "host", "processor": _processor(), "cores": os.cpu_count(), **key}
    report = _C.cuda_report()
    devices = report["devices"]
    if not 0 <= device < len(devices):
        raise ConfigError(f"device {device} is not one of the {len(devices)} visible; see `sidp doctor`")
    same = [gpu["uuid"] for gpu in devices if gpu["name"] == devices[device]["name"]]
    return {
        "backend": "nvshmem",
        "gpu": devices[device]["name"],
        "uuid": devices[device]["uuid"],
        "gpus": same,
        "driver": str(report["driver"]),
        **key,
    }


def differences(measured_on: object, here: Mapping[str, Any]) -> list[str]:
    """Why a profile measured there is not valid here, in words; empty: it is.

    A GPU is covered by a profile that names its UUID, whatever other GPUs either process sees.
    """
    if not isinstance(measured_on, Mapping):
        return ["it does not say on which machine it was measured"]
    found = [
        f"{key} is {here[key]!r} here and was {measured_on.get(key)!r}"
        for key in here
        if key not in ("uuid", "gpus") and measured_on.get(key) != here[key]
    ]
    if "uuid" in here and here["uuid"] not in (measured_on.get("gpus") or []):
        found.append(f"GPU {here['uuid']} is not one of those measured")
    return found


def document(profile: MachineProfile, key: Mapping[str, Any], memory_bytes: int, source: str) -> dict[str, Any]:
    """The content of a profile's file."""
    return {
        "schema": SCHEMA,
        "machine": dict(key),
        "memory_gib": memory_bytes / 2**30,
        "memory_source": "the machine itself",
        "measured": {"source": source, **profile.facts()},
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a profile's file whole or not at all; ``ConfigError`` if that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; set SIDP_CACHE_DIR to a folder that can be") from error


def amend(path: Path, profile: MachineProfile, words: str) -> None:
    """Replaces the figures of a profile's file by others of the same machine; ``words`` are added to its source."""
    content = json.loads(path.read_text(encoding="utf-8"))
    source = content["measured"].get("source", "")
    write(path, content | {"measured": {"source": f"{source}; {words}", **profile.facts()}})


def read(path: Path, device: int | None = None) -> MachineProfile:
    """The profile in a file, for this machine; ``ConfigError`` if it is damaged, of another schema, or foreign."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable profile: {error}") from error
    check_schema(path, content)
    if found := differences(content.get("machine"), machine_key(device)):
        raise ConfigError(f"{path} was measured elsewhere or before: {'; '.join(found)}. Run `sidp calibrate` here")
    return MachineProfile.from_facts(content.get("measured") or {})


def check_schema(path: Path, content: object) -> None:
    """``ConfigError`` for a file of another schema than this version's, where it names one."""
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a profile: it holds a {type(content).__name__}")
    if content.get("schema", SCHEMA) != SCHEMA:
        raise ConfigError(
            f"{path} has schema {content['schema']!r}, this version reads {SCHEMA}: run `sidp calibrate` again"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
