"""Two machines that were measured, as configurations. Every number is an input; none comes from a step with copies."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from ..errors import ConfigError
from ..planner.gpus import GpuProfile
from .config import SimulationConfig

_H200 = GpuProfile.read("H200").rates

# H200 pair: 16 layers of Qwen3-32B's shape in bf16, without attention. Of bench/results/2x-nvidia-h200/bench.json.
H200_LAYER_BYTES = 2 * (8192 * 5120 + 3 * 5120 * 25600 + 5120 * 10240)
# One matrix product beside copies that owners write over the same product alone, by rows (gemm_beside_copies).
H200_SLOWDOWN = (
    (64, 1.18), (128, 1.18), (256, 1.09), (512, 1.07), (768, 1.07), (1024, 1.11), (1536, 1.08), (2048, 1.08),
    (4096, 1.07),
)  # fmt: skip
H200_LINK_GBPS = _H200.copy_bytes_per_s / 1e9
H200_ROW_BYTES = (2 * (8192 + 5120), 2 * (10240 + 5120))  # attention and residual there, qkv and residual back
H200_COPY_LATENCY_US = 2.4  # 1 MiB written took that much longer than at the rate of 1 GiB, both ways at once

# H20 x 8 of bytedance-iaas/sglang, benchmark/kernels/sidp: 48 equal layers, one of 8 local, a matrix product each.
H20_LAYER_BYTES = 353_894_400
H20_PRODUCT_MS = 375.62 / 48  # at 32768 rows, no copies
H20_PRODUCT_ROWS = 32768
# The H200's, which has the same 18 NVLink lanes, read by the puller's engine as there: none was published for the H20.
H20_LINK_GBPS = 374.0
H20_COPY_LATENCY_US = 3.6


def h200_slowdown(rows: int) -> float:
    """Measured from 64 to 4096 rows, linear between, constant beyond."""
    points = H200_SLOWDOWN
    if rows <= points[0][0]:
        return points[0][1]
    for (low, left), (high, right) in pairwise(points):
        if rows <= high:
            return left + (right - left) * (rows - low) / (high - low)
    return points[-1][1]


def h200_pair(rows: int, **changes: Any) -> SimulationConfig:
    """Two H200 in phase, both directions of the link in use, for one of the measured row counts.

    Fields of SimulationConfig in ``changes`` replace those given here.
    """
    times = _H200.linear_times  # of 16 layers with all weights local
    assert times is not None
    if rows not in times.rows:
        raise ConfigError(f"{rows} rows were not measured; take one of {', '.join(map(str, times.rows))}")
    config = SimulationConfig(
        world_size=2,
        layer_bytes=(H200_LAYER_BYTES,) * 16,
        layer_ms=times.seconds[times.rows.index(rows)] * 1e3 / 16,
        rows=rows,
        link_gbps=H200_LINK_GBPS,
        copy_latency_us=H200_COPY_LATENCY_US,
        overlap_slowdown=h200_slowdown(rows),
        num_steps=6,
        row_bytes=sum(H200_ROW_BYTES) // 2,
        round_trip_us=_H200.round_trip_us,
    )
    return replace(config, **changes)


def h20_eight(stagger_ms: float, rows: int = 4096, **changes: Any) -> SimulationConfig:
    """Eight H20, one forward of 6 cycles of 8 layers, rank ``r`` starting ``r * stagger_ms`` late.

    The ring holds two cycles of 7 layers; the first is there at the start and refilled at the end. Each rank was a
    process that copied to its own GPU on a stream of its own, and nobody took turns on the links.
    """
    config = SimulationConfig(
        world_size=8,
        layer_bytes=(H20_LAYER_BYTES,) * 48,
        layer_ms=H20_PRODUCT_MS * rows / H20_PRODUCT_ROWS,
        rows=rows,
        link_gbps=H20_LINK_GBPS,
        copy_latency_us=H20_COPY_LATENCY_US,
        exclusive_links=False,
        ring_slots=14,
        warm_slots=7,
        start_ms=tuple(rank * stagger_ms for rank in range(8)),
    )
    return replace(config, **changes)
