"""Figures of ``bench/results``: what was measured, for tests that hold predictions to it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def medians(machine: str, case: str, metric: str, subject: str, **parameters: Any) -> dict[int, float]:
    """Rows (or tokens) to the median of a figure; key 0 where it has no such parameter."""
    return {of: figure["median"] for of, figure in measured(machine, case, metric, subject, **parameters).items()}


def measured(machine: str, case: str, metric: str, subject: str, **parameters: Any) -> dict[int, dict[str, Any]]:
    """The same with the whole figure."""
    wanted = (case, metric, subject, "measured")
    found = {
        figure["parameters"].get("tokens", figure["parameters"].get("rows", 0)): figure
        for figure in figures(machine)
        if tuple(figure[key] for key in ("case", "metric", "subject", "status")) == wanted
        and parameters.items() <= figure["parameters"].items()
    }
    assert found, f"{machine} has no {case}/{metric} of {subject}"
    return found


@cache
def runs(machine: str) -> list[dict[str, Any]]:
    """The machine's results files."""
    files = sorted((RESULTS / machine).glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@cache
def figures(machine: str) -> list[dict[str, Any]]:
    """All rows of them."""
    return [figure for run in runs(machine) for figure in run["figures"]]
