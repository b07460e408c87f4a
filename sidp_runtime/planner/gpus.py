"""GPU profiles: measured where somebody measured, else a datasheet scaled by what the measured GPU reached of its own.

``gpu_profiles.json`` holds the facts, each with its source. A file that ``sidp calibrate`` wrote has the same form; a
plan may be for another machine than this one, so it takes any, and says where it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..machine_profile import MachineProfile, check_schema, positive, whole

_BUNDLED = Path(__file__).with_name("gpu_profiles.json")
_MOST_GIB = 1 << 20
_REFERENCE = "H200"  # the GPU with both a datasheet and measurements


@dataclass(frozen=True)
class GpuProfile:
    """A GPU as the planner sees it: its memory, and in ``rates`` the very profile that ``ModePolicy`` works with."""

    name: str
    memory_bytes: int  # total as cudaMemGetInfo gives it
    rates: MachineProfile
    origin: str  # "measured" or "datasheet"
    sources: tuple[str, ...]
    nvlink_domain: int | None = None  # GPUs that reach each other over NVLink

    def linears_s(self, num_bytes: float, rows: float, element_bytes: int = 2) -> float:
        """``MachineProfile.linears_s``."""
        return self.rates.linears_s(num_bytes, rows, element_bytes)

    @classmethod
    def read(cls, gpu: str | Path) -> GpuProfile:
        """A bundled profile by name (in any case) or a JSON file with one profile of the same form."""
        bundled = _bundled()
        names = {name.lower(): name for name in bundled}
        if (name := names.get(str(gpu).lower())) is not None:
            return cls.from_facts(name, bundled[name])
        path = Path(gpu)
        if not path.is_file():
            raise ConfigError(f"gpu {str(gpu)!r} is neither a file nor one of {', '.join(bundled)}")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a readable GPU profile: {error}") from error
        check_schema(path, facts)
        return cls.from_facts(path.stem, facts)

    @classmethod
    def of_device(cls, name: str) -> GpuProfile | None:
        """The bundled profile of a GPU by what the driver calls it, e.g. "NVIDIA H200"; None if none is."""
        words = name.split()
        return next((cls.read(known) for known in bundled_gpus() if known in words), None)

    @classmethod
    def from_facts(cls, name: str, facts: Mapping[str, Any]) -> GpuProfile:
        """From an entry of ``gpu_profiles.json``; ``ConfigError`` names what is missing or not above 0."""
        try:
            memory_gib = _positive(facts, "memory_gib")
            if memory_gib > _MOST_GIB:
                raise ConfigError(f"GPU profile {name!r}: memory_gib is {memory_gib}, must be at most {_MOST_GIB}")
            memory_bytes = int(memory_gib * 2**30)
            if "measured" in facts:
                return cls._measured(name, memory_bytes, facts)
            return cls._datasheet(name, memory_bytes, facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            words = error if isinstance(error, ConfigError) else f"{type(error).__name__} {error}"
            raise ConfigError(f"GPU profile {name!r}: {words}; compare gpu_profiles.json") from error

    @classmethod
    def _measured(cls, name: str, memory_bytes: int, facts: Mapping[str, Any]) -> GpuProfile:
        measured = facts["measured"]
        rates = MachineProfile.from_facts(measured)
        assumed = f"; assumed: {', '.join(rates.assumed)}" if rates.assumed else ""
        where = facts.get("machine")
        on = f", measured on {_machine_text(where)}" if isinstance(where, Mapping) else ""
        return cls(
            name=name,
            memory_bytes=memory_bytes,
            rates=rates,
            origin="measured",
            sources=(f"memory: {facts['memory_source']}", f"rates: {measured['source']}{on}{assumed}"),
            nvlink_domain=_domain(facts),
        )

    @classmethod
    def _datasheet(cls, name: str, memory_bytes: int, facts: Mapping[str, Any]) -> GpuProfile:
        sheet, reference = facts["datasheet"], _bundled()[_REFERENCE]
        reached = {key: reference["measured"][m] / reference["datasheet"][key] for key, m in _REACHED.items()}
        link, requests = _positive(sheet, "link_gbps") * 1e9 * reached["link_gbps"], request_share()
        shares = ", ".join(f"{share:.0%} of {key}" for key, share in reached.items())
        return cls(
            name=name,
            memory_bytes=memory_bytes,
            rates=MachineProfile(
                copy_bytes_per_s=link,
                round_trip_us=float(reference["measured"]["round_trip_us"]),
                request_bytes_per_s=link * requests,
                memory_bytes_per_s=_positive(sheet, "memory_gbps") * 1e9 * reached["memory_gbps"],
                flops_per_s=_positive(sheet, "bf16_tflops") * 1e12 * reached["bf16_tflops"],
            ),
            origin="datasheet",
            sources=(
                f"memory: {facts['memory_source']}",
                f"rates: {sheet['source']}; of it what {_REFERENCE} reached of its own: {shares}; its round trip, "
                f"and {requests:.0%} of a copy's rate for the rows of requests",
            ),
            nvlink_domain=_domain(facts),
        )


_REACHED = {"memory_gbps": "memory_gbps", "bf16_tflops": "tflops", "link_gbps": "copy_gbps"}


def request_share() -> float:
    """Of a copy's rate, what many rows of a request had where both were measured."""
    measured = _bundled()[_REFERENCE]["measured"]
    return float(measured["request_gbps"] / measured["copy_gbps"])


def bundled_gpus() -> list[str]:
    """Names that ``GpuProfile.read`` knows without a file."""
    return list(_bundled())


def _bundled() -> dict[str, dict[str, Any]]:
    return dict(json.loads(_BUNDLED.read_text(encoding="utf-8")))


def _machine_text(machine: Mapping[str, Any]) -> str:
    what = machine.get("gpu") or machine.get("processor")
    versions = [f"{key} {machine[key]}" for key in ("driver", "torch", "package") if machine.get(key)]
    return ", ".join([str(what), *versions])


def _positive(facts: Mapping[str, Any], key: str) -> float:
    return positive(key, facts[key])


def _domain(facts: Mapping[str, Any]) -> int | None:
    return None if facts.get("nvlink_domain") is None else whole("nvlink_domain", facts["nvlink_domain"])
