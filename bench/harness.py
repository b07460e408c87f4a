"""What a benchmark is made of: cases, the figures they give, and the report of a run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidp_runtime.errors import ConfigError

from .environment import environment

SCHEMA = 3
OWN = "sidp"  # subjects of this name, or that begin with it, are this package; all others are peers


@dataclass(frozen=True)
class Case:
    """One benchmark, in ``cases/<key>.py``: its ``run(context)`` is called in each of ``world_size`` processes.

    ``verification``: what is compared before a figure counts. ``deadline_s``: its processes are killed after it.
    ``ranks``: processes; on a machine with several GPUs ``every_gpu`` makes it one for each.
    """

    key: str
    description: str
    verification: str
    peers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("host", "nvshmem")
    ranks: int = 2
    every_gpu: bool = False
    deadline_s: float = 120

    def world_size(self, num_gpus: int) -> int:
        return num_gpus if self.every_gpu and num_gpus > 1 else self.ranks


@dataclass(frozen=True)
class Bar:
    """What a figure is held to; ``gpus``: it holds of so many GPUs or more, each with one rank."""

    limit: float
    at_least: bool
    gpus: int = 0

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Figure:
    """One row: the samples of one metric of one subject, or why there are none.

    ``status``: "measured"; "unavailable", a peer or a machine's lack that ``reason`` names; "error", which fails the
    run. ``higher_is_better`` None: a figure that explains others and is not compared.
    """

    case: str
    metric: str
    subject: str
    unit: str
    parameters: Mapping[str, int | str] = field(default_factory=dict)
    samples: tuple[float, ...] = ()
    higher_is_better: bool | None = None
    bar: Bar | None = None
    status: str = "measured"
    reason: str = ""

    @property
    def key(self) -> str:
        """Names the row in every run: case/metric/subject and its parameters."""
        words = [f"{name}={value}" for name, value in self.parameters.items()]
        return " ".join([f"{self.case}/{self.metric}/{self.subject}", *words])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def passed(self) -> bool:
        if self.status != "measured":
            return self.status == "unavailable"
        return self.bar is None or self.bar.met(self.median)

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "key": self.key,
            "case": self.case,
            "metric": self.metric,
            "subject": self.subject,
            "parameters": dict(self.parameters),
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "status": self.status,
        }
        if self.status == "measured":
            document |= {"median": self.median, "min": min(self.samples), "max": max(self.samples)}
            document |= {"samples": list(self.samples)}
        else:
            document["reason"] = self.reason
        if self.bar is not None:
            document["bar"] = {"limit": self.bar.limit, "at_least": self.bar.at_least, "passed": self.passed}
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Figure:
        bar = document.get("bar")
        return cls(
            case=document["case"],
            metric=document["metric"],
            subject=document["subject"],
            unit=document["unit"],
            parameters=document["parameters"],
            samples=tuple(document.get("samples", ())),
            higher_is_better=document["higher_is_better"],
            bar=None if bar is None else Bar(bar["limit"], bar["at_least"]),
            status=document["status"],
            reason=document.get("reason", ""),
        )


@dataclass
class Report:
    """The figures of one run, where they were taken and what ran beside them.

    ``ranks``: for each case that ran, its processes, GPUs and seconds. ``events``: lanes of the timeline case, if any.
    """

    command: str
    backend: str
    shape: str
    machine: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    ranks: dict[str, dict[str, Any]] = field(default_factory=dict)
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failures(self) -> list[Figure]:
        return [figure for figure in self.figures if not figure.passed]

    def write(self, path: Path) -> None:
        document = {
            "schema": SCHEMA,
            "command": self.command,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "backend": self.backend,
            "shape": self.shape,
            **(self.machine or environment()),
            "cases": self.ranks,
            "figures": [figure.to_json() for figure in self.figures],
            "timeline": self.timeline,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")  # a run that is cut off leaves the last whole file
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """``ConfigError`` for a file that is no result of this program."""
        try:
            document = json.loads(path.read_text())
            if document["schema"] != SCHEMA:
                raise ConfigError(f"{path} has schema {document['schema']}, this program reads {SCHEMA}")
            return cls(
                document["command"],
                document["backend"],
                document["shape"],
                {name: document[name] for name in ("commit", "dirty", "machine", "versions", "settings")},
                [Figure.from_json(figure) for figure in document["figures"]],
                document["cases"],
                document["timeline"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is no result of `sidp bench run --json`: {error!r}") from error


def render(figures: Iterable[Figure], console: Console) -> None:
    """Tables as nccl-tests prints them: a row for each set of parameters, a column for each subject."""
    figures = list(figures)
    for case, metric in dict.fromkeys((f.case, f.metric) for f in figures):
        rows = [f for f in figures if (f.case, f.metric) == (case, metric)]
        names = list(dict.fromkeys(name for f in rows for name in f.parameters))
        subjects = list(dict.fromkeys(f.subject for f in rows if f.status == "measured"))
        if not subjects:
            continue
        table = Table(title=f"{case}: {metric}, {rows[0].unit} (median, spread)", title_justify="left")
        for name in names:
            table.add_column(name, justify="right")
        for subject in subjects:
            table.add_column(subject, justify="right")
        for key in dict.fromkeys(tuple(f.parameters.items()) for f in rows):
            found = {f.subject: f for f in rows if tuple(f.parameters.items()) == key}
            values = dict(key)
            table.add_row(
                *(readable(name, values.get(name, "")) for name in names),
                *(_cell(found.get(subject)) for subject in subjects),
            )
        console.print(table)
    render_notes(figures, console)


def render_notes(figures: Iterable[Figure], console: Console) -> None:
    """Why rows are missing, and which bars are met."""
    figures = list(figures)
    notes = {(f.case, f.subject, f.status, f.reason) for f in figures if f.status != "measured"}
    for case, subject, status, reason in sorted(notes):
        console.print(f"{case}: {subject}: {status}: {reason}", markup=False, highlight=False)
    for f in figures:
        if f.status == "measured" and f.bar is not None:
            verdict = "ok" if f.passed else "MISSED"
            sign = ">=" if f.bar.at_least else "<="
            console.print(f"{verdict:6} {f.key}: {f.median:.4g} {f.unit} {sign} {f.bar.limit:g}", highlight=False)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.status != "measured":
        return figure.status
    spread = max(figure.samples) - min(figure.samples)
    return f"{figure.median:.4g} ±{50 * spread / figure.median:.0f}%" if figure.median else f"{figure.median:.4g}"


def readable(name: str, value: int | str) -> str:
    """A parameter as people write it: sizes in KiB, MiB or GiB."""
    if name == "bytes" and isinstance(value, int):
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= size:
                return f"{value / size:.4g} {unit}"
    return str(value)


def pairwise(over: Sequence[float], under: Sequence[float]) -> tuple[float, ...]:
    """Ratios of samples that were taken in turn, so that a machine that slows down slows both."""
    return tuple(a / b for a, b in zip(over, under, strict=True))
