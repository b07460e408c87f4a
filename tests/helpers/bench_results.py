"""Figures of ``bench/results``: what was measured, for tests that hold predictions to it."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def medians(machine: str, case: str, metric: str, subject: str) -> dict[int, float]:
    """Rows (or tokens) to the median of a figure; key 0 where it has no such parameter."""
    figures = json.loads((RESULTS / machine / f"{case}.json").read_text(encoding="utf-8"))["figures"]
    found = {
        figure["parameters"].get("tokens", figure["parameters"].get("rows", 0)): figure["median"]
        for figure in figures
        if (figure["metric"], figure["subject"], figure["status"]) == (metric, subject, "measured")
    }
    assert found, f"{machine}/{case}.json has no {metric} of {subject}"
    return found
