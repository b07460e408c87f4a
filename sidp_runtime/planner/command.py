"""The ``sidp plan`` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from .display import render
from .gpus import GpuProfile
from .memory import MemorySettings
from .model_shape import ModelShape
from .planner import Planner
from .workload import Workload


def run(
    *,
    model: str,
    gpu: str,
    replicas: int,
    workloads: Sequence[str],
    dtype: str | None,
    utilization: float,
    workspace_gib: float,
    ring_slots: int,
    cas_rows: int,
    step_tokens: int,
    max_sequences: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Plans and prints; with ``plot`` a picture too."""
    if not 0 <= workspace_gib < 1 << 20:
        raise ConfigError(f"workspace is {workspace_gib} GiB, must be at least 0")
    settings = MemorySettings(
        utilization=utilization, workspace_bytes=int(workspace_gib * 2**30), max_rows=cas_rows, ring_slots=ring_slots
    )
    planner = Planner(
        ModelShape.read(model, dtype), GpuProfile.read(gpu), replicas, settings, step_tokens, max_sequences
    )
    plan = planner.plan(*map(Workload.parse, workloads))
    if plot is not None:
        from .plot import write

        write(plan, plot)
    if as_json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        render(plan, Console())
