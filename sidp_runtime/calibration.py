"""``sidp calibrate``: two ranks measure what mode policy and planner need to know, through the library itself."""

from __future__ import annotations

import json
import multiprocessing
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from . import _C, machine_profile, policy
from .errors import ConfigError, DeadlineError, SidpError
from .machine_profile import MachineProfile

if TYPE_CHECKING:
    from rich.console import Console

    from ._torch_calibration import CalibrationJob

_HOST_ROWS = (1, 4, 16, 64, 256)
_GPU_ROWS = (1, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096)
_GPU_MODEL = "Qwen/Qwen3-32B"


@dataclass(frozen=True)
class CheckedStep:
    """A step of ``tokens`` rows, ms: what the policy predicts and what was measured, mean of the ranks."""

    tokens: int
    was_predicted_ms: float
    was_measured_ms: float
    cas_predicted_ms: float
    cas_measured_ms: float

    @property
    def chosen(self) -> str:
        return "CaS" if self.cas_predicted_ms < self.was_predicted_ms else "WaS"

    @property
    def faster(self) -> str:
        return "CaS" if self.cas_measured_ms < self.was_measured_ms else "WaS"

    @property
    def loss(self) -> float:
        """Share by which the chosen mode is slower than the faster one, as measured."""
        chosen = self.cas_measured_ms if self.chosen == "CaS" else self.was_measured_ms
        return chosen / min(self.cas_measured_ms, self.was_measured_ms) - 1


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found. ``document`` is the profile's file; ``steps`` is empty without a check."""

    profile: MachineProfile
    document: dict[str, Any]
    steps: tuple[CheckedStep, ...]
    seconds: float


def make_job(
    *, backend: str, model: str | None, num_layers: int | None, check: tuple[int, ...], profile: MachineProfile | None
) -> CalibrationJob:
    """Default shapes: Qwen3-32B's on GPUs, small ones on the host, where weights are float32."""
    from ._torch_calibration import CalibrationJob
    from .planner.model_shape import ModelShape

    if backend not in ("host", "nvshmem"):
        raise ConfigError(f"backend {backend!r} is neither host nor nvshmem")
    host = backend == "host"
    if not host and (count := len(_C.cuda_report()["devices"])) < 2:
        raise ConfigError(
            f"{count} GPU(s) are visible here: link and round trip lie between two. Show this process two, or leave it "
            "to a runtime, which measures the link through its pool (ModePolicy.calibrated(device=..., pool=...))"
        )
    if (num_layers is not None and num_layers < 4) or any(tokens < 1 for tokens in check):
        raise ConfigError(f"layers is {num_layers}, must be at least 4; tokens are {check}, must be at least 1")
    common: dict[str, Any] = {
        "backend": backend,
        "world_size": 2,
        "num_layers": num_layers or 8,
        "rows": _HOST_ROWS if host else _GPU_ROWS,
        "check": tuple(sorted(set(check))),
        "profile": profile,
    }
    if model is None and host:
        return CalibrationJob(dtype="float32", hidden=768, q=768, kv=256, inner=2048, gated=True, **common)
    shape = ModelShape.read(model or _GPU_MODEL)
    return CalibrationJob(
        dtype="float32" if host else shape.dtype,
        hidden=shape.hidden,
        q=shape.num_heads * shape.head_dim,
        kv=shape.num_kv_heads * shape.head_dim,
        inner=shape.intermediate,
        gated=shape.mlp_params > 2.5 * shape.hidden * shape.intermediate,
        **common,
    )


def calibrate(job: CalibrationJob, stage: Callable[[str], object] = lambda _: None) -> Calibration:
    """Starts the ranks and measures; ``stage`` is told what begins. ``DeadlineError``, or ``SidpError`` of a rank."""
    from . import _torch
    from ._torch_calibration import rank_main

    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    store, _, port = _torch.make_store_server()
    token = secrets.token_hex(16)
    ranks = []
    try:
        for rank in range(job.world_size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=rank_main, args=(rank, job, port, token, theirs), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, mine))
        found = _receive([mine for _, mine in ranks], 2 * job.deadline_ms, stage)
        for process, _ in ranks:
            process.join(30)
    finally:
        for process, mine in ranks:
            if process.is_alive():
                process.kill()
                process.join()
            mine.close()
        del store
    profile = MachineProfile.from_facts(found[0]["facts"])
    steps = []
    for rows in zip(*(rank.get("check", ()) for rank in found), strict=True):
        steps.append(
            CheckedStep(
                **{key: type(value)(sum(row[key] for row in rows) / len(rows)) for key, value in rows[0].items()}
            )
        )
    key = found[0]["key"]
    source = f"sidp calibrate, {job.world_size} ranks, layers of {job.hidden} and {job.inner} columns, {job.dtype}"
    device = None if job.backend == "host" else 0
    document = machine_profile.document(profile, key, policy.memory_bytes(device), source)
    return Calibration(profile, document, tuple(steps), time.monotonic() - start)


def _receive(pipes: Sequence[Connection], deadline_ms: int, stage: Callable[[str], object]) -> list[dict[str, Any]]:
    """What each rank sends, by rank; the first error ends the wait, as the others would only wait for that rank."""
    found: dict[int, dict[str, Any]] = {}
    at = ["its start"] * len(pipes)
    end = time.monotonic() + deadline_ms / 1000
    while len(found) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in found]
        ready = wait([pipes[rank] for rank in waiting], max(0.0, end - time.monotonic()))
        if not ready:
            where = ", ".join(f"rank {rank} ({at[rank]})" for rank in waiting)
            words = f"{where} did not finish the calibration within {deadline_ms} ms"
            raise DeadlineError(words, peer=waiting[0], waited_ms=deadline_ms)
        for rank in waiting:
            if pipes[rank] not in ready:
                continue
            try:
                message = json.loads(pipes[rank].recv())
            except EOFError:
                words = f"rank {rank} ended in {at[rank]}; what it printed says why"
                raise SidpError(words, rank=rank) from None
            if "error" in message:
                raise SidpError(message["error"], rank=rank)
            if "stage" not in message:
                found[rank] = message
                continue
            at[rank] = message["stage"]
            if rank == 0:
                stage(message["stage"])
    return [found[rank] for rank in range(len(pipes))]


def store(document: dict[str, Any]) -> list[Path]:
    """Keeps the profile where ``ModePolicy.calibrated`` looks: a file for the host, or one for each GPU it covers."""
    key = document["machine"]
    uuids = key.get("gpus")
    paths = [policy.cache_path_of(name) for name in (uuids or ["host"])]
    for path in paths:
        machine_profile.write(path, document)
    return paths


def run(
    *,
    backend: str,
    model: str | None,
    num_layers: int | None,
    out: Path | None,
    check: bool,
    tokens: str,
    profile: Path | None,
    json_path: Path | None,
) -> None:
    """The command."""
    from rich.console import Console

    try:
        sizes = tuple(int(part) for part in tokens.split(",")) if check else ()
    except ValueError:
        raise ConfigError(f"tokens {tokens!r} are not of the form 1,16,256") from None
    given = None
    if profile is not None:
        given = machine_profile.read(profile, None if backend == "host" else 0)
    job = make_job(backend=backend, model=model, num_layers=num_layers, check=sizes, profile=given)
    console, start = Console(), time.monotonic()

    def note(stage: str) -> None:
        console.print(f"{time.monotonic() - start:6.1f} s: {stage}", highlight=False)

    with console.status("starting") as status:  # of which only a terminal shows anything
        found = calibrate(job, status.update if console.is_terminal else note)
    render(found, console)
    paths = [] if given is not None else store(found.document)
    if out is not None:
        machine_profile.write(out, found.document)
        paths.append(out)
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
    if json_path is not None:
        steps = [vars(step) | {"chosen": step.chosen, "faster": step.faster, "loss": step.loss} for step in found.steps]
        shape = {k: v for k, v in vars(replace(job, profile=None)).items() if k != "profile"}
        machine_profile.write(
            json_path, {"job": shape, "seconds": found.seconds, "profile": found.document, "steps": steps}
        )


def render(found: Calibration, console: Console) -> None:
    """Tables: the rates, products by rows, and predicted against measured."""
    from rich.table import Table

    p = found.profile
    console.print(
        f"link {p.copy_bytes_per_s / 1e9:.3g} GB/s after {p.copy_latency_us:.3g} us a copy, round trip "
        f"{p.round_trip_us:.3g} us, many rows at {(p.request_bytes_per_s or p.copy_bytes_per_s) / 1e9:.3g} GB/s, "
        f"memory {p.memory_bytes_per_s / 1e9:.3g} GB/s, {p.flops_per_s / 1e12:.3g} TFLOPS; "
        f"measured{' and checked' if found.steps else ''} in {found.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if p.linear_times is not None:
        text = ", ".join(
            f"{r}: {s * 1e3:.3g}" for r, s in zip(p.linear_times.rows, p.linear_times.seconds, strict=True)
        )
        console.print(f"a layer's products, ms by rows: {text}", highlight=False)
    if not found.steps:
        return
    table = Table(title="predicted against measured, ms a step")
    for heading in ("tokens", "WaS", "took", "off", "CaS", "took", "off", "chosen", "faster", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    offs = []
    for s in found.steps:
        off = (s.was_predicted_ms / s.was_measured_ms - 1, s.cas_predicted_ms / s.cas_measured_ms - 1)
        offs += [abs(value) for value in off]
        table.add_row(
            str(s.tokens),
            f"{s.was_predicted_ms:.4g}",
            f"{s.was_measured_ms:.4g}",
            f"{off[0]:+.1%}",
            f"{s.cas_predicted_ms:.4g}",
            f"{s.cas_measured_ms:.4g}",
            f"{off[1]:+.1%}",
            s.chosen,
            s.faster,
            f"{s.loss:.1%}",
        )
    console.print(table)
    worst = max(step.loss for step in found.steps)
    console.print(
        f"predictions off by {median(offs):.1%} in the median, {max(offs):.1%} at most; the chosen mode loses at most "
        f"{worst:.1%}",
        highlight=False,
    )
