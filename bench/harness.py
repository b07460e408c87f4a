"""What every case shares: samples, the machine they were taken on, the table and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its samples and the bar it is held to, if any."""

    key: str
    description: str
    unit: str
    samples: tuple[float, ...]
    at_least: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def passed(self) -> bool:
        return self.at_least is None or self.median >= self.at_least

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "description": self.description,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.samples),
            "max": max(self.samples),
            "samples": list(self.samples),
            "at_least": self.at_least,
            "passed": self.passed,
        }


@dataclass
class Report:
    """The figures of one run and where they were taken."""

    command: str
    figures: list[Figure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(figure.passed for figure in self.figures)

    def write(self, path: Path) -> None:
        document = {
            "command": self.command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **environment(),
            "figures": [figure.to_json() for figure in self.figures],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    def render(self, console: Console) -> None:
        table = Table(title=self.command)
        for heading in ("figure", "median", "min", "max", "unit", "bar"):
            table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right")
        for f in self.figures:
            bar = "" if f.at_least is None else f"{'ok' if f.passed else 'MISSED'} (>= {f.at_least:g})"
            table.add_row(
                f.description,
                f"{f.median:.3g}",
                f"{min(f.samples):.3g}",
                f"{max(f.samples):.3g}",
                f.unit,
                bar,
            )
        console.print(table)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Commit, machine and versions, for a results file."""
    return {
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {
            "python": sys.version.split()[0],
            **{name: _version(name) for name in ("sidp_runtime", "torch")},
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` if it has changes; None outside one."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
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
    return platform.processor()
