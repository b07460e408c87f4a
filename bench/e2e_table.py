"""The results of ``bench.e2e_vllm``: figures, ratios, and why SiDP loses where it does."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .harness import OWN, Bar, Figure, render_notes

CASE = "e2e_vllm"
OVER_DP = 0.95  # where plain data parallelism fits
OVER_BEST = 1.5  # of dp and tp, in one workload at least
START_OVER_DP = 1.0  # x DP's seconds, where both read a checkpoint from the disk


@dataclass(frozen=True)
class Sample:
    """What the engines of a system answered after one sample of a workload."""

    engines: list[dict[str, Any]]

    def total(self, name: str) -> int:
        return sum(engine[name] for engine in self.engines)

    @property
    def tokens(self) -> int:
        """That were generated."""
        return sum(sum(engine["tokens"]) for engine in self.engines)

    @property
    def seconds(self) -> float:
        """From the first engine's start to the last one's end; the clock is the machine's."""
        return float(max(e["end"] for e in self.engines) - min(e["start"] for e in self.engines))

    @property
    def busy(self) -> float:
        """Seconds of all engines together."""
        return float(sum(engine["end"] - engine["start"] for engine in self.engines))

    def values(self) -> dict[str, tuple[str, float]]:
        """By metric: unit and value. All but the throughput explain it."""
        steps = max(1, self.total("steps"))
        return {
            "throughput": ("tokens/s", self.tokens / self.seconds),
            "tokens_a_step": ("tokens", self.tokens / steps * len(self.engines)),
            "step_time": ("ms", self.busy / steps * 1e3),
            "preemptions": ("requests", self.total("preemptions")),
            "copied": ("GB", self.total("copied") / 1e9),
            "copy_rate": ("GB/s", self.total("copied") / self.busy / 1e9),
            "requests": ("calls", self.total("requests")),
            "idle": ("share", 1 - self.busy / (len(self.engines) * self.seconds)),
        }


class Pick(NamedTuple):
    """The planner's: how many layers are resident, and the engines' mode."""

    resident: int
    mode: str

    def __str__(self) -> str:
        return f"{self.resident} resident{'' if self.mode == 'auto' else f', mode {self.mode}'}"


def picked(options: argparse.Namespace, system: str, workload: str) -> Pick | None:
    """None where the planner was not asked."""
    pick: Pick | None = options.picks[workload] if system.startswith(OWN) else None
    return pick


@dataclass
class Results:
    """Of a run so far. ``failed`` and ``unavailable``: why. ``order``: in which systems were started.

    Engines go by system and what the planner picked, None where it was not asked.
    """

    options: argparse.Namespace
    starts: dict[tuple[str, Pick | None], list[float]] = field(default_factory=dict)
    kv_tokens: dict[tuple[str, Pick | None], list[int]] = field(default_factory=dict)
    setup: dict[tuple[str, Pick | None], list[dict[str, float]]] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failed: dict[tuple[str, Pick | None], str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def started(self, system: str, pick: Pick | None, seconds: float, ready: list[dict[str, Any]]) -> None:
        """``ready``: what each engine said then: its KV tokens, and seconds of a pool's ``setup`` by part."""
        self.starts.setdefault((system, pick), []).append(seconds)
        self.kv_tokens.setdefault((system, pick), []).extend(answer["kv_tokens"] for answer in ready)
        self.setup.setdefault((system, pick), []).extend(answer["setup"] for answer in ready)

    def engines(self, system: str, workload: str) -> tuple[str, Pick | None]:
        """Which ones run the workload."""
        return system, picked(self.options, system, workload)

    def sampled(self, system: str, workload: str, sample: Sample) -> None:
        self.samples.setdefault((system, workload), []).append(sample)

    def series(self, system: str, workload: str, metric: str) -> list[float]:
        return [sample.values()[metric][1] for sample in self.samples.get((system, workload), [])]

    def median(self, system: str, workload: str, metric: str) -> float:
        return statistics.median(self.series(system, workload, metric))

    @property
    def own(self) -> list[str]:
        return [system for system in self.options.systems if system.startswith(OWN)]

    def ratio(self, own: str, other: str, workload: str) -> list[float]:
        """Throughput over that of the other system on the same prompts, sample by sample; empty without both."""
        ours, theirs = (self.series(system, workload, "throughput") for system in (own, other))
        return [a / b for a, b in zip(ours, theirs, strict=False)]  # one may have failed earlier

    def cause(self, own: str, other: str, workload: str) -> str:
        """Which factors of the throughput, tokens a step over time of a step, and what lies behind them."""
        ours, theirs = ({m: self.median(s, workload, m) for m in _FACTORS} for s in (own, other))
        words = [f"steps {ours['step_time'] / theirs['step_time']:.2f} x as long"]
        words.append(f"{ours['tokens_a_step'] / theirs['tokens_a_step']:.2f} x the tokens a step")
        ours_kv, theirs_kv = (statistics.median(self.kv_tokens[self.engines(s, workload)]) for s in (own, other))
        words.append(f"{ours_kv / theirs_kv:.2f} x the KV tokens an engine")
        if ours["preemptions"] or theirs["preemptions"]:
            words.append(f"{ours['preemptions']:.0f} preemptions, not {theirs['preemptions']:.0f}")
        words.append(f"{ours['copy_rate']:.3g} GB/s copied an engine, {ours['requests']:.0f} requests to owners")
        if ours["idle"] > 0.05:
            words.append(f"engines idle {ours['idle']:.0%} of the time")
        return f"{system_word(own)} < {system_word(other)}: {', '.join(words)}"

    def causes(self) -> dict[str, list[str]]:
        """By workload, of every ratio below 1."""
        found: dict[str, list[str]] = {}
        for workload in self.options.workloads:
            for own in self.own:
                for other in ("dp", "tp"):
                    ratio = self.ratio(own, other, workload)
                    if ratio and statistics.median(ratio) < 1:
                        found.setdefault(workload, []).append(self.cause(own, other, workload))
        return found

    def run(self) -> dict[str, Any]:
        """How it ran, for the results file."""
        replicas, gpus = self.options.replicas, self.options.gpus
        names = ("workloads", "repeats", "rounds", "weights", "cold", "engine", "sidp", "quick")
        return {
            "world_size": replicas,
            "gpus": gpus,
            "shared_gpu": 0 < gpus < replicas,
            "order": self.order,
            "causes": self.causes(),
            "resident": {workload: pick and pick.resident for workload, pick in self.options.picks.items()},
            "mode": {workload: pick and pick.mode for workload, pick in self.options.picks.items()},
            **{name: getattr(self.options, name) for name in names},
        }

    def figures(self) -> list[Figure]:
        found = []
        for system in self.options.systems:
            subject = system.replace("-", "_")
            for key in (key for key in self.starts if key[0] == system):
                found.append(Figure(CASE, "start", subject, "s", _where(key[1]), tuple(self.starts[key]), False))
                kv_tokens = tuple(self.kv_tokens[key])
                found.append(Figure(CASE, "kv_of_an_engine", subject, "tokens", _where(key[1]), kv_tokens, True))
                for part in self.setup[key][0]:
                    seconds = tuple(setup[part] for setup in self.setup[key])
                    found.append(Figure(CASE, "setup", subject, "s", {"part": part, **_where(key[1])}, seconds))
            for workload in self.options.workloads:
                if (system, workload) not in self.samples:
                    continue
                for metric, (unit, _) in self.samples[system, workload][0].values().items():
                    samples = tuple(self.series(system, workload, metric))
                    better = True if metric == "throughput" else None
                    where = {"workload": workload, **_where(self.engines(system, workload)[1])}
                    found.append(Figure(CASE, metric, subject, unit, where, samples, better))
            for (_, pick), reason in ((k, v) for k, v in self.failed.items() if k[0] == system):
                found.append(Figure(CASE, "run", subject, "", _where(pick), status="error", reason=reason))
            if system in self.unavailable:
                found.append(Figure(CASE, "run", subject, "", status="unavailable", reason=self.unavailable[system]))
        return found + self._ratios()

    def _ratios(self) -> list[Figure]:
        # A bar says something of GPUs alone, one for each engine, at full size.
        held = self.options.backend != "host" and self.options.gpus == self.options.replicas and not self.options.quick
        found: list[Figure] = []
        for (system, pick), starts in self.starts.items():
            theirs = self.starts.get(("dp", None), [])
            if system.startswith(OWN) and theirs:
                from_disk = self.options.weights == "checkpoint" and self.options.cold
                bar = Bar(START_OVER_DP, at_least=False) if held and from_disk else None
                over = tuple(a / b for a, b in zip(starts, theirs, strict=False))
                subject = system.replace("-", "_")
                found.append(Figure(CASE, "start_over_dp", subject, "x", _where(pick), over, False, bar))
        best: list[float] = []
        for workload in self.options.workloads:
            for own in self.own:
                subject = own.replace("-", "_")
                ratios = {other: self.ratio(own, other, workload) for other in ("dp", "tp")}
                for other, ratio in ratios.items():
                    if ratio:
                        bar = Bar(OVER_DP, at_least=True) if held and other == "dp" else None
                        where = {"workload": workload, **_where(self.engines(own, workload)[1])}
                        found.append(Figure(CASE, f"over_{other}", subject, "x", where, tuple(ratio), True, bar))
                if all(ratios.values()):
                    best.append(min(statistics.median(ratio) for ratio in ratios.values()))
        if best:
            bar = Bar(OVER_BEST, at_least=True) if held else None
            found.append(Figure(CASE, "over_better_of_dp_and_tp", OWN, "x", {}, (max(best),), True, bar))
        return found


_FACTORS = ("step_time", "tokens_a_step", "preemptions", "copy_rate", "requests", "idle")


def _where(pick: Pick | None) -> dict[str, int | str]:
    """Mode auto is what the system's name says."""
    return {} if pick is None else {"resident": pick.resident, **({} if pick.mode == "auto" else {"mode": pick.mode})}


def system_word(system: str) -> str:
    name, _, mode = system.partition("-")
    return {"dp": "DP", "tp": "TP", OWN: "SiDP"}[name] + (f" {mode}" if mode else "")


def render(results: Results, console: Console) -> None:
    """Tokens a second with ratios, then what explains them, then failures, bars and causes."""
    systems, causes = results.options.systems, results.causes()
    others = [other for other in ("dp", "tp") if other in systems]
    speed = Table(title="new tokens/s of the group (median, spread)", title_justify="left")
    speed.add_column("in:out:prompts")
    for system in systems:
        speed.add_column(system_word(system), justify="right")
    for own in results.own:
        for other in others:
            speed.add_column(f"{system_word(own)}/{system_word(other)}", justify="right")
    speed.add_column("where SiDP loses", overflow="fold", ratio=1)
    for workload in results.options.workloads:
        cells = [_cell(results, system, workload) for system in systems]
        for own in results.own:
            for other in others:
                ratio = results.ratio(own, other, workload)
                cells.append(f"{statistics.median(ratio):.3g}" if ratio else "")
        speed.add_row(workload, *cells, "\n".join(causes.get(workload, [])))
    console.print(speed)
    metrics = {
        "tokens_a_step": "tokens a step",
        "step_time": "ms a step",
        "preemptions": "preemptions",
        "copied": "GB copied",
        "copy_rate": "GB/s an engine",
        "requests": "requests",
        "idle": "idle",
    }
    why = Table(title="medians that explain it", title_justify="left")
    for name in ("in:out:prompts", "system", "picked", "start, s", "KV tokens an engine", *metrics.values()):
        why.add_column(name, justify="right", overflow="fold")
    for workload in results.options.workloads:
        for system in systems:
            if (system, workload) in results.samples:
                key = results.engines(system, workload)
                start, kv = statistics.median(results.starts[key]), statistics.median(results.kv_tokens[key])
                pick = "" if key[1] is None else str(key[1])
                cells = [f"{results.median(system, workload, metric):.4g}" for metric in metrics]
                why.add_row(workload, system_word(system), pick, f"{start:.1f}", f"{kv:.0f}", *cells)
    if why.row_count:
        console.print(why)
    render_notes(results.figures(), console)


def _cell(results: Results, system: str, workload: str) -> str:
    samples = results.series(system, workload, "throughput")
    if samples:
        median = statistics.median(samples)
        return f"{median:.4g} ±{50 * (max(samples) - min(samples)) / median:.0f}%"
    if system in results.unavailable:
        return "unavailable"
    return "failed" if results.engines(system, workload) in results.failed else ""
