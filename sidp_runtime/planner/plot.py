"""A plan as a picture: KV tokens and tokens/s over the number of resident layers."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, UnsupportedError
from .planner import Plan


def write(plan: Plan, path: Path) -> None:
    """Draws to a file; its ending names the format. ``UnsupportedError`` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("--plot needs matplotlib: pip install 'sidp_runtime[plot]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    speed, room = figure.subplots(2, 1, sharex=True)
    residents = [scheme.num_resident for scheme in plan.residency]
    speed.plot(residents, [scheme.tokens_per_s or 0 for scheme in plan.residency], label="SiDP")
    room.plot(residents, [scheme.group_kv_tokens / 1e6 for scheme in plan.residency], label="SiDP")
    for style, scheme in zip(("--", ":", "-.", (0, (1, 4))), (plan.dp, *plan.tp), strict=False):
        speed.axhline(scheme.tokens_per_s or 0, linestyle=style, color="grey", label=scheme.name)
        room.axhline(scheme.group_kv_tokens / 1e6, linestyle=style, color="grey", label=scheme.name)
    speed.set_ylabel("output tokens/s")
    room.set_ylabel("KV tokens, millions")
    room.set_xlabel("resident layers")
    speed.legend(fontsize="small")
    work = plan.workload
    speed.set_title(
        f"{plan.shape.name}, {plan.replicas} x {plan.gpu.name} ({plan.gpu.origin}), "
        f"{work.prompt_tokens} in, {work.output_tokens} out" + (f", {work.prompts} prompts" if work.prompts else "")
    )
    try:
        canvas.figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot to {path}: {error}") from error
