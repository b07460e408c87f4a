"""What a job did, as plain data and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .results import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from .replicas import Replica


@dataclass(frozen=True)
class RankReport:
    """One rank. Bytes are of this process; ``None`` where the rank died before it could say.

    ``full_bytes``: what a full replica holds of the layers that are pooled. ``computed_bytes``: what the placement
    gives this rank: owned and resident layers and the ring. ``measured_bytes``: the same as the kernel counts it,
    shared pages divided by the processes that map them (PSS), or on a GPU by how much free memory fell.
    ``kv_bytes_gained``: full less computed.
    """

    rank: int
    pid: int
    fate: str  # "" or why it died
    batches: int
    tokens: int
    busy_s: float
    full_bytes: int | None = None
    computed_bytes: int | None = None
    ring_bytes: int | None = None
    measured_bytes: int | None = None
    kv_bytes_gained: int | None = None
    load_bytes_read: int | None = None
    load_s: float | None = None
    steps: dict[str, int] = field(default_factory=dict)
    bytes_by_peer: list[int] = field(default_factory=list)
    requests_by_peer: list[int] = field(default_factory=list)
    served_by_peer: list[int] = field(default_factory=list)
    fallbacks: int | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class JobReport:
    """A finished job. ``prompts_skipped`` were in the results file already; tokens and seconds are of this run."""

    model: str
    out: str
    world_size: int
    mode: str
    dtype: str
    batch_size: int
    threads_per_replica: int
    prompts: int
    prompts_skipped: int
    prompt_tokens: int
    new_tokens: int
    start_s: float
    work_s: float
    restarts: int
    ranks: list[RankReport]
    warnings: list[str]

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all replicas together, loading not counted."""
        return self.new_tokens / self.work_s if self.work_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}

    def write(self, path: Path) -> None:
        """Writes it as JSON. ``ConfigError`` if the file cannot be written."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    def render(self, console: Console) -> None:
        """Prints the closing tables."""
        _render(self, console)


def rank_report(replica: Replica) -> RankReport:
    """From what a replica reported when it was ready and at the end."""
    memory, stats, load = replica.memory, replica.stats, replica.load
    full = computed = measured = None
    if memory:
        full = memory["pooled_bytes"]
        computed = memory["owned_bytes"] + memory["pool_resident_bytes"] + memory["ring_bytes"]
        on_host = memory["pool_pss"] + memory["ring_rss"] + memory["resident_rss"]
        measured = memory.get("device_bytes", on_host)
    return RankReport(
        rank=replica.rank,
        pid=replica.pid,
        fate=replica.words,
        batches=replica.batches,
        tokens=replica.tokens,
        busy_s=replica.busy_s,
        full_bytes=full,
        computed_bytes=computed,
        ring_bytes=memory.get("ring_bytes"),
        measured_bytes=measured,
        kv_bytes_gained=None if full is None or computed is None else full - computed,
        load_bytes_read=load.get("bytes_read"),
        load_s=load.get("seconds"),
        steps=dict(stats.get("steps", {})),
        bytes_by_peer=list(stats.get("bytes_by_peer", [])),
        requests_by_peer=list(stats.get("requests_by_peer", [])),
        served_by_peer=list(stats.get("served_by_peer", [])),
        fallbacks=stats.get("fallbacks"),
        stats=dict(stats),
        memory=dict(memory),
    )


def check_pool_was_used(ranks: list[RankReport]) -> None:
    """A pool that shared nothing is an error, whatever the output looks like: ``UsageError`` with the counters.

    Steps by copying must have moved bytes, and steps by requests must have sent some: a ring that was filled once
    at the start proves nothing about the latter.
    """
    if len(ranks) < 2:
        return
    for rank in ranks:
        moved, requests = sum(rank.bytes_by_peer), sum(rank.requests_by_peer)
        steps = {name.lower(): count for name, count in rank.steps.items()}
        used = (steps.get("was", 0) == 0 or moved > 0) and (
            steps.get("cas", 0) == 0 or requests > 0 or bool(rank.fallbacks)
        )
        # A rank may own every layer that is not resident: then there is nothing to ask for.
        streams = rank.full_bytes is None or rank.full_bytes > (rank.computed_bytes or 0) - (rank.ring_bytes or 0)
        if not used and streams:
            _raise_unused(len(ranks), f"replica {rank.rank}: steps {_counts(rank.steps)}", moved, requests)
    steps_made = sum(sum(rank.steps.values()) for rank in ranks)
    moved = sum(sum(rank.bytes_by_peer) for rank in ranks)
    requests = sum(sum(rank.requests_by_peer) for rank in ranks)
    if steps_made and not moved and not requests:
        _raise_unused(len(ranks), f"all together: {steps_made} steps", moved, requests)


def _raise_unused(replicas: int, what: str, moved: int, requests: int) -> None:
    raise UsageError(
        f"the weights of {replicas} replicas were not shared: {what}, {moved} bytes moved, {requests} requests sent. "
        "The results are written, but memory was saved by nothing that can be seen: please report this with --report",
        expected=1,
        seen=0,
    )


def bytes_text(num_bytes: float | None) -> str:
    """For people: MiB, or GiB from one on."""
    if num_bytes is None:
        return "?"
    return f"{num_bytes / 2**30:.2f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _counts(steps: Mapping[str, int], separator: str = ", ") -> str:
    return separator.join(f"{name} {count}" for name, count in steps.items() if count) or "0"


def _render(report: JobReport, console: Console) -> None:
    from rich.table import Table

    fresh = report.prompts - report.prompts_skipped
    skipped = f", {report.prompts_skipped} were there already" if report.prompts_skipped else ""
    console.print(f"[bold]{fresh}[/] prompts to {report.out}{skipped}", highlight=False, soft_wrap=True)
    if not report.ranks:
        return
    console.print(
        f"{report.new_tokens} new tokens in {report.work_s:.1f} s: [bold]{report.tokens_per_s:.1f} tokens/s[/] "
        f"from {report.world_size} replica(s) of {report.threads_per_replica} thread(s), {report.dtype}, "
        f"mode {report.mode}; started in {report.start_s:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    memory = Table(title="Pooled weights that a rank holds", title_justify="left")
    for column in ("rank", "full replica", "computed", "measured", "KV room gained", "read"):
        memory.add_column(column, justify="right")
    for rank in report.ranks:
        sizes = (rank.full_bytes, rank.computed_bytes, rank.measured_bytes, rank.kv_bytes_gained, rank.load_bytes_read)
        memory.add_row(str(rank.rank), *(bytes_text(size) for size in sizes))
    console.print(memory)
    work = Table(title="Work", title_justify="left")
    for column in (
        "rank",
        "batches",
        "tokens",
        "steps",
        "from peers",
        "requests",
        "served",
        "fallbacks",
    ):
        work.add_column(column, justify="right")
    for rank in report.ranks:
        told = bool(rank.stats)
        work.add_row(
            str(rank.rank),
            str(rank.batches),
            str(rank.tokens),
            _counts(rank.steps, "\n") if told else "?",
            _by_peer(rank, [bytes_text(n) for n in rank.bytes_by_peer], rank.bytes_by_peer) if told else "?",
            _by_peer(rank, [str(n) for n in rank.requests_by_peer], rank.requests_by_peer) if told else "?",
            str(sum(rank.served_by_peer)) if told else "?",
            str(rank.fallbacks) if told else "?",
        )
    console.print(work)
    for rank in report.ranks:
        if rank.fate:
            console.print(f"[yellow]replica {rank.rank} {rank.fate}[/]", highlight=False, soft_wrap=True)


def _by_peer(rank: RankReport, texts: list[str], values: list[int]) -> str:
    others = [(peer, text) for peer, (text, value) in enumerate(zip(texts, values, strict=True)) if value]
    if len(others) <= 1:
        return others[0][1] if others else "0"
    return "\n".join(f"{peer}: {text}" for peer, text in others)
