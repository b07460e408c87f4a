"""A plan as tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .memory import non_zero
from .planner import HIDDEN_WITHIN, Plan, Scheme


def render(plan: Plan, console: Console) -> None:
    """Prints memory by item, speed, thresholds and warnings."""
    shape, gpu, work = plan.shape, plan.gpu, plan.workload
    console.print(
        f"[bold]{escape(shape.name)}[/] ({shape.num_params / 1e9:.2f} B parameters, {shape.dtype}) on "
        f"{plan.replicas} x {escape(gpu.name)} ({gpu.origin}), "
        f"{_job(plan) or f'{work.prompt_tokens} tokens in and {work.output_tokens} out'}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory(plan))
    console.print(_speed(plan))
    for text in _findings(plan):
        console.print(text, highlight=False, soft_wrap=True)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def _job(plan: Plan) -> str:
    """Its parts, if it is one."""
    parts = [
        f"{part.prompts} prompts of {part.prompt_tokens} tokens in and {part.output_tokens} out" for part in plan.job
    ]
    return f"a job of {' and '.join(parts)} (steps: of an endless queue of their mean)" if parts else ""


def _memory(plan: Plan) -> Table:
    rows = plan.rows()
    table = Table("GiB a device", title="Memory", title_justify="left")
    for scheme in rows:
        table.add_column(scheme.name, justify="right")
    for item in non_zero([scheme.device for scheme in rows]):
        table.add_row(item, *(_gib(scheme.device.items.get(item, 0)) for scheme in rows))
    table.add_section()
    table.add_row("device", *(_gib(scheme.device.device_bytes) for scheme in rows))
    if any(not scheme.device.fits for scheme in rows):
        table.add_row("lacking", *(_gib(scheme.device.shortfall_bytes) for scheme in rows), style="red")
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else "-"


def _speed(plan: Plan) -> Table:
    table = Table(title=f"{plan.replicas} devices together, predicted", title_justify="left")
    table.add_column("scheme")
    for column in (
        "KV tokens",
        "sequences",
        "step tokens",
        "mode",
        "step ms",
        "WaS alone / in turn / CaS ms",
        "output tokens/s",
    ):
        table.add_column(column, justify="right")
    ratio = 1 + plan.workload.prompt_tokens / plan.workload.output_tokens
    for scheme in plan.rows():
        units = plan.replicas // scheme.devices_per_unit
        table.add_row(
            scheme.name,
            f"{scheme.group_kv_tokens:,}",
            f"{units * scheme.device.sequences:,}",
            f"{scheme.batch * ratio:.0f}",
            scheme.mode or "",
            "does not fit" if scheme.step_s is None else f"{scheme.step_s * 1e3:.1f}",
            _times(scheme),
            "" if scheme.tokens_per_s is None else f"{scheme.tokens_per_s:,.0f}",
        )
    return table


def _times(scheme: Scheme) -> str:
    if scheme.times is None:
        return ""
    seconds = (scheme.times.was_floor_s, scheme.times.was_s, scheme.times.cas_s)
    return " / ".join(f"{value * 1e3:.1f}" for value in seconds)


def _findings(plan: Plan) -> list[str]:
    limits, best = plan.thresholds, plan.best
    fit = best.device.sequences
    found = [
        f"best residency: {best.num_resident} of {plan.shape.num_layers} layers on every replica"
        f"{_which(plan.resident_layers)}, mode {plan.mode}{_against(plan, best)}"
    ]
    if plan.kv_gain is not None:
        found.append(f"KV of SiDP: {plan.kv_gain:.2f} x plain DP")
    found.append(
        f"with {best.num_resident} resident: the stream adds at most {HIDDEN_WITHIN:.0%} from "
        f"{_count(limits.hidden_from_sequences, fit)} sequences on, in steps of prompts from "
        f"{_count(limits.hidden_from_prompt_tokens)} tokens on"
    )
    if limits.cas_below is not None:
        found.append(f"CaS is predicted faster in decode steps of fewer than {_count(limits.cas_below, fit)} sequences")
    return found


def _which(layers: list[int]) -> str:
    """In brackets, runs as first-last."""
    if not layers:
        return ""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = [f"{first}-{last}" if first < last else f"{first}" for first, last in runs]
    return f" ({', '.join(words)})"


def _against(plan: Plan, best: Scheme) -> str:
    return "" if plan.speedup is None else f", {plan.speedup:.2f} x the tokens/s of plain DP"


def _count(count: int | None, fit: int | None = None) -> str:
    if count is None:
        return "(never)"
    return f"{count:,}" + (f" ({fit:,} fit)" if fit is not None and count > fit else "")
