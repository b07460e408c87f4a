"""Pictures of a run: bandwidth over size, step time over tokens, the timeline of a WaS step, and figures over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sidp_runtime.errors import ConfigError, UnsupportedError

from .harness import Figure, Report, readable


def write(report: Report, folder: Path) -> list[Path]:
    """PNG files, one for each kind that the report has figures for. ``UnsupportedError`` without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install 'sidp_runtime[plot]'") from error
    measured = [figure for figure in report.figures if figure.status == "measured"]
    where = f"{report.machine['machine']['name']}, {report.shape}"
    pictures: list[tuple[str, Any]] = []
    for case in ("link_bandwidth", "fetch", "put_signal"):
        rows = [f for f in measured if (f.case, f.metric) == (case, "bandwidth")]
        rows = [f for f in rows if f.parameters.get("direction", "one") == "one"]
        if rows:
            pictures.append((f"{case}.png", _lines(rows, "bytes", f"{case}: one direction, {where}", log_y=True)))
    for case in ("step_time", "step_boundary"):
        rows = [f for f in measured if f.case == case and f.metric in ("step", "floor")]
        if rows:
            pictures.append((f"{case}.png", _lines(rows, "tokens", f"{case}, {where}", log_y=True)))
    rows = [f for f in measured if f.case == "incast"]
    rows = [f for f in rows if f.parameters["ranks"] == max(f.parameters["ranks"] for f in rows)]
    if rows:
        pictures.append(("incast.png", _lines(rows, "pullers", f"incast, {where}", log_x=False)))
    rows = [f for f in measured if f.case == "scale_steps" and f.metric in ("step", "floor")]
    for tokens in sorted({f.parameters["tokens"] for f in rows}):
        some = [f for f in rows if f.parameters["tokens"] == tokens]
        title = f"steps of {tokens} tokens over ranks, {where}"
        pictures.append((f"scale_steps_{tokens}.png", _lines(some, "ranks", title)))
    rows = [f for f in measured if (f.case, f.metric) == ("scale_link", "aggregate")]
    if rows:
        pictures.append(("scale_link.png", _lines(rows, "ranks", f"all ranks pull at once, {where}")))
    if report.timeline:
        pictures.append(("timeline.png", _timeline(report.timeline, where)))
    if not pictures:
        raise ConfigError("the results have no figure that is drawn: bandwidth, step time, incast or timeline")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures:
            picture.savefig(folder / name, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write pictures to {folder}: {error}") from error
    return [folder / name for name, _ in pictures]


def _lines(rows: Iterable[Figure], parameter: str, title: str, *, log_x: bool = True, log_y: bool = False) -> Any:
    """Medians over a parameter, a line a subject, with the spread as a band."""
    from matplotlib.figure import Figure as Picture

    rows = list(rows)
    picture = Picture(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for subject in dict.fromkeys(f.subject for f in rows):
        line = sorted((f for f in rows if f.subject == subject), key=lambda f: int(f.parameters[parameter]))
        places = [int(f.parameters[parameter]) for f in line]
        style = "-" if subject.startswith("sidp") else "--"
        (drawn,) = axes.plot(places, [f.median for f in line], style, marker=".", label=subject)
        axes.fill_between(
            places,
            [min(f.samples) for f in line],
            [max(f.samples) for f in line],
            color=drawn.get_color(),
            alpha=0.15,
        )
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    ticks = sorted({int(f.parameters[parameter]) for f in rows})
    axes.set_xticks(ticks, [readable(parameter, tick) for tick in ticks], rotation=45)
    axes.set_xlabel(parameter)
    axes.set_ylabel(f"{rows[0].metric.replace('_', ' ')}, {rows[0].unit}")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return picture


def _timeline(entries: list[dict[str, Any]], where: str) -> Any:
    """A line a rank: waiting for layers against computing with them, on each rank's own clock."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 3), layout="constrained")
    axes = picture.subplots()
    kinds = {"waiting": "tab:red", "computing, streamed": "tab:blue", "computing, local": "tab:gray"}
    for entry in entries:
        start, waited = entry["start_ms"], entry["wait_ms"]
        kind = "computing, streamed" if entry["streamed"] else "computing, local"
        line = (entry["rank"] - 0.35, 0.7)
        axes.broken_barh([(start, waited)], line, color=kinds["waiting"])
        axes.broken_barh([(start + waited, entry["compute_ms"])], line, color=kinds[kind], edgecolor="white")
    ranks = sorted({entry["rank"] for entry in entries})
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.set_xlabel("ms")
    axes.set_title(f"WaS steps of {entries[0]['tokens']} tokens, {where}", fontsize="medium")
    for name, colour in kinds.items():
        axes.plot([], [], color=colour, linewidth=6, label=name)
    axes.legend(fontsize="small", ncols=3)
    return picture
