"""Two runs, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from .harness import Figure, Report


@dataclass(frozen=True)
class Row:
    """One key. ``change``: share by which the median got worse (negative: better), None without two of them."""

    key: str
    unit: str
    old: float | None
    new: float | None
    change: float | None
    verdict: str  # "ok", "worse", "missing", "failed" or "new"


@dataclass
class Comparison:
    """``passed``: no row is worse than the threshold allows, and none is missing."""

    threshold: float
    rows: list[Row] = field(default_factory=list)
    other_machine: bool = False

    @property
    def bad(self) -> list[Row]:
        return [row for row in self.rows if row.verdict in ("worse", "missing", "failed")]

    @property
    def passed(self) -> bool:
        return not self.bad

    def render(self, console: Console) -> None:
        table = Table(title=f"worse by more than {self.threshold:.1%}, or missing: {len(self.bad)} of {len(self.rows)}")
        table.add_column("row", overflow="fold")
        for heading in ("old", "new", "unit", "change", "verdict"):
            table.add_column(heading, justify="right")
        for row in self.bad or [row for row in self.rows if row.change is not None]:
            numbers = ["" if value is None else f"{value:.4g}" for value in (row.old, row.new)]
            change = "" if row.change is None else f"{row.change:+.1%}"
            table.add_row(row.key, *numbers, row.unit, change, row.verdict)
        console.print(table)
        if self.other_machine:
            console.print("the two runs are of different machines, backends or shapes")


def compare(old: Report, new: Report, threshold: float) -> Comparison:
    """Rows that are compared are those with a direction (``higher_is_better``). Medians count."""
    result = Comparison(threshold)
    result.other_machine = (old.machine["machine"]["name"], old.backend, old.shape) != (
        new.machine["machine"]["name"],
        new.backend,
        new.shape,
    )
    after = {figure.key: figure for figure in new.figures}
    before = {figure.key: figure for figure in old.figures}
    for key, figure in before.items():
        if figure.status == "measured":
            result.rows.append(_row(figure, after.get(key), threshold))
    for key, figure in after.items():
        if figure.status == "error":
            result.rows.append(Row(key, figure.unit, None, None, None, "failed"))
        elif figure.status == "measured" and (key not in before or before[key].status != "measured"):
            result.rows.append(Row(key, figure.unit, None, figure.median, None, "new"))
    return result


def _row(old: Figure, new: Figure | None, threshold: float) -> Row:
    if new is None or new.status != "measured":
        return Row(old.key, old.unit, old.median, None, None, "missing")
    if old.higher_is_better is None:
        return Row(old.key, old.unit, old.median, new.median, None, "ok")
    # A difference of two times can be 0 or below it; its change is then told by the sign alone.
    scale = abs(old.median) or 1.0
    change = (old.median - new.median if old.higher_is_better else new.median - old.median) / scale
    return Row(old.key, old.unit, old.median, new.median, change, "worse" if change > threshold else "ok")
