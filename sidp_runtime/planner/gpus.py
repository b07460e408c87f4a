"""GPU profiles: measured where somebody measured, else a datasheet scaled by what the measured GPU reached of its own.

``gpu_profiles.json`` holds the facts, each with its source. A profile of another GPU is a JSON file of the same form.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..policy import MachineProfile

_BUNDLED = Path(__file__).with_name("gpu_profiles.json")
_MOST_GIB = 1 << 20
_REFERENCE = "H200"  # the GPU with both a datasheet and measurements


@dataclass(frozen=True)
class LinearTimes:
    """Measured seconds of matrix products by rows, for ``num_bytes`` of bf16 weights. Rows ascend."""

    num_bytes: int
    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def seconds_at(self, rows: float) -> float:
        """Between two points the line through them; beyond the last one in proportion to the rows."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        right = bisect_left(self.rows, rows)
        x0, x1 = self.rows[right - 1], self.rows[right]
        y0, y1 = self.seconds[right - 1], self.seconds[right]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)


@dataclass(frozen=True)
class GpuProfile:
    """A GPU as the planner sees it. ``rates``: the same figures that ``ModePolicy`` works with."""

    name: str
    memory_bytes: int  # total as cudaMemGetInfo gives it
    rates: MachineProfile
    origin: str  # "measured" or "datasheet"
    sources: tuple[str, ...]
    linear_times: LinearTimes | None = None
    nvlink_domain: int | None = None  # GPUs that reach each other over NVLink

    def linears_s(self, num_bytes: float, rows: float, element_bytes: int = 2) -> float:
        """Seconds of products of ``rows`` rows with ``num_bytes`` of weights; 0 rows take no time.

        Measured times where there are some, else the roofline of ``include/sidp/mode_policy.hpp``.
        """
        if rows <= 0:
            return 0.0
        if self.linear_times is not None:
            return self.linear_times.seconds_at(rows) * num_bytes / self.linear_times.num_bytes
        weights = num_bytes / element_bytes
        return max(num_bytes / self.rates.memory_bytes_per_s, 2.0 * rows * weights / self.rates.flops_per_s)

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
        return cls.from_facts(path.stem, facts)

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
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"GPU profile {name!r}: {type(error).__name__} {error}; compare gpu_profiles.json"
            ) from error

    @classmethod
    def _measured(cls, name: str, memory_bytes: int, facts: Mapping[str, Any]) -> GpuProfile:
        measured = facts["measured"]
        times = None
        if "linears" in measured:
            linears = measured["linears"]
            times = LinearTimes(
                _count(linears, "num_bytes"),
                tuple(_whole("linears rows", rows) for rows in linears["rows"]),
                tuple(_number("linears ms", ms) / 1e3 for ms in linears["ms"]),
            )
            rising = list(times.rows) == sorted(set(times.rows)) and list(times.seconds) == sorted(times.seconds)
            if not rising or len(times.rows) != len(times.seconds) or not times.rows or times.seconds[0] <= 0:
                raise ConfigError(f"GPU profile {name!r}: linears needs rows that ascend and a time above 0 for each")
        return cls(
            name=name,
            memory_bytes=memory_bytes,
            rates=MachineProfile(
                copy_bytes_per_s=_positive(measured, "copy_gbps") * 1e9,
                round_trip_us=_positive(measured, "round_trip_us"),
                memory_bytes_per_s=_positive(measured, "memory_gbps") * 1e9,
                flops_per_s=_positive(measured, "bf16_tflops") * 1e12,
            ),
            origin="measured",
            sources=(f"memory: {facts['memory_source']}", f"rates: {measured['source']}"),
            linear_times=times,
            nvlink_domain=_domain(facts),
        )

    @classmethod
    def _datasheet(cls, name: str, memory_bytes: int, facts: Mapping[str, Any]) -> GpuProfile:
        sheet, reference = facts["datasheet"], _bundled()[_REFERENCE]
        reached = {key: reference["measured"][m] / reference["datasheet"][key] for key, m in _REACHED.items()}
        shares = ", ".join(f"{share:.0%} of {key}" for key, share in reached.items())
        return cls(
            name=name,
            memory_bytes=memory_bytes,
            rates=MachineProfile(
                copy_bytes_per_s=_positive(sheet, "link_gbps") * 1e9 * reached["link_gbps"],
                round_trip_us=float(reference["measured"]["round_trip_us"]),
                memory_bytes_per_s=_positive(sheet, "memory_gbps") * 1e9 * reached["memory_gbps"],
                flops_per_s=_positive(sheet, "bf16_tflops") * 1e12 * reached["bf16_tflops"],
            ),
            origin="datasheet",
            sources=(
                f"memory: {facts['memory_source']}",
                f"rates: {sheet['source']}; of it what {_REFERENCE} reached of its own: {shares}; its round trip",
            ),
            nvlink_domain=_domain(facts),
        )


_REACHED = {"memory_gbps": "memory_gbps", "bf16_tflops": "bf16_tflops", "link_gbps": "copy_gbps"}


def bundled_gpus() -> list[str]:
    """Names that ``GpuProfile.read`` knows without a file."""
    return list(_bundled())


def _bundled() -> dict[str, dict[str, Any]]:
    return dict(json.loads(_BUNDLED.read_text(encoding="utf-8")))


def _positive(facts: Mapping[str, Any], key: str) -> float:
    return _number(key, facts[key])


def _count(facts: Mapping[str, Any], key: str) -> int:
    return _whole(key, facts[key])


def _domain(facts: Mapping[str, Any]) -> int | None:
    return None if facts.get("nvlink_domain") is None else _count(facts, "nvlink_domain")


def _number(key: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"GPU profile: {key} is {value!r}, must be a number above 0")
    return float(value)


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"GPU profile: {key} is {value!r}, must be an integer of at least 1")
    return value
