"""The KV table of ``docs/model.md``: three models, three GPUs, 2, 4 and 8 replicas, as Markdown.

python -m sidp_runtime.planner.paper_table
"""

from __future__ import annotations

from dataclasses import dataclass

from . import memory
from .gpus import GpuProfile
from .memory import DeviceMemory, MemorySettings
from .model_shape import ModelShape

MODELS = ("Qwen/Qwen3-32B", "Qwen/Qwen2.5-72B", "meta-llama/Llama-3.1-70B")
GPUS = ("H20", "H200", "B200")
REPLICAS = (2, 4, 8)
_CONTEXT = 4096  # tokens of a sequence; without windows it only decides where the last block lies


@dataclass(frozen=True)
class KvRow:
    """KV tokens of ``replicas`` devices together; 0 where the weights do not fit. ``mlp_only``: only MLPs pooled."""

    model: str
    gpu: str
    replicas: int
    dp: int
    tp2: int
    tp_all: int
    sidp: int
    mlp_only: int


def kv_row(model: str, gpu: str, replicas: int, settings: MemorySettings | None = None) -> KvRow:
    """One line of the table."""
    shape, profile = ModelShape.read(model), GpuProfile.read(gpu)
    settings = settings or MemorySettings()

    def plain(degree: int) -> int:
        device = memory.plain(shape, profile.memory_bytes, _CONTEXT, settings, degree)
        return _tokens(device, replicas // degree)

    def shared(mlp_only: bool) -> int:
        placement = memory.place(shape, replicas, 0, settings, mlp_only=mlp_only)
        device = memory.shared(shape, profile.memory_bytes, _CONTEXT, settings, placement, mlp_only=mlp_only)
        return _tokens(device, replicas)

    return KvRow(model, gpu, replicas, plain(1), plain(2), plain(replicas), shared(False), shared(True))


def _tokens(device: DeviceMemory, units: int) -> int:
    return units * device.kv_tokens if device.fits else 0


def rows() -> list[KvRow]:
    """All 27 lines."""
    return [kv_row(model, gpu, replicas) for model in MODELS for gpu in GPUS for replicas in REPLICAS]


def markdown() -> str:
    """The table. Thousands of tokens; "-": the weights do not fit."""
    lines = [
        "| model | GPU | replicas | DP | TP2 | TP over all | SiDP | SiDP / DP | SiDP / TP2 | SiDP / TP over all "
        "| SiDP of MLPs alone | it / DP |",
        "| --- | --- " + "| ---: " * 10 + "|",
    ]
    for row in rows():
        cells = [
            row.model.split("/")[1],
            row.gpu,
            str(row.replicas),
            *(_thousands(tokens) for tokens in (row.dp, row.tp2, row.tp_all, row.sidp)),
            *(_ratio(row.sidp, other) for other in (row.dp, row.tp2, row.tp_all)),
            _thousands(row.mlp_only),
            _ratio(row.mlp_only, row.dp),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:,.0f}" if tokens else "-"


def _ratio(a: int, b: int) -> str:
    return f"{a / b:.2f}" if a and b else "-"


if __name__ == "__main__":
    print(markdown(), end="")
