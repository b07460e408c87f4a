"""Steps measured on two H200 against the mode policy's formulas, whose inputs were measured apart (docs/model.md).

A step whose samples differ by more than 5 % of their median says little: the host was late in some eager ones. Such
rows count in the median alone, and are named here.
"""

from __future__ import annotations

from statistics import median

import pytest
from helpers.bench_results import measured, medians

from sidp_runtime import _C, Mode
from sidp_runtime.planner import GpuProfile, ModelShape

MACHINE = "2x-nvidia-h200"
H200 = GpuProfile.read("H200").rates
QWEN = ModelShape.read("Qwen/Qwen3-32B")
LAYER_BYTES = QWEN.linear_bytes // QWEN.num_layers


# The benchmark's step: of 16 layers each rank owns as many, one op from one attention to the next, no attention. A row
# goes as attention's result and the residual, and comes back as qkv and the residual.
def shape_of(world_size: int) -> _C.StepShape:
    return _C.StepShape(
        total_bytes=16 * LAYER_BYTES,
        streamed_bytes=(16 - 16 // world_size) * LAYER_BYTES,
        streamed_layers=16 - 16 // world_size,
        ops_per_layer=1,
        row_bytes=2 * ((8192 + 5120) + (10240 + 5120)),
        element_bytes=2,
        world_size=world_size,
    )


SHAPE = shape_of(2)
MEASURED_MS = {
    (mode, form): medians(MACHINE, "step_time", "step", f"sidp_{mode.name.lower()}{form}")
    for mode in (Mode.WAS, Mode.CAS)
    for form in ("", "_graph")
}
MOST_SPREAD = 0.05  # between the least and the greatest sample, of their median
NOISY = {(Mode.CAS, ""): {16, 64, 128}, (Mode.CAS, "_graph"): {128}}


def noisy(mode: Mode, form: str) -> set[int]:
    steps = measured(MACHINE, "step_time", "step", f"sidp_{mode.name.lower()}{form}")
    return {rows for rows, step in steps.items() if step["max"] - step["min"] > MOST_SPREAD * step["median"]}


def test_the_bundled_profile_is_what_its_source_says() -> None:
    times = H200.linear_times
    assert times is not None
    local_ms = medians(MACHINE, "step_time", "step", "all_local_graph")
    assert dict(zip(times.rows, times.seconds, strict=True)) == pytest.approx(
        {rows: ms / 1e3 for rows, ms in local_ms.items()}, rel=1e-3
    )
    assert times.num_bytes == 16 * LAYER_BYTES
    (link_gbps,) = medians(MACHINE, "step_time", "link", "cudaMemcpyAsync_write").values()
    assert H200.copy_bytes_per_s == pytest.approx(link_gbps * 1e9, rel=1e-3)
    round_trip_us = medians(MACHINE, "remote_compute", "over_local", "sidp_graph")[1]
    assert H200.round_trip_us == pytest.approx(round_trip_us, rel=2e-3)
    assert H200.memory_bytes_per_s == pytest.approx(times.num_bytes / times.seconds[0], rel=1e-3)
    assert H200.flops_per_s == pytest.approx(times.rows[-1] * times.num_bytes / times.seconds[-1], rel=1e-3)


@pytest.mark.parametrize(("mode", "form"), MEASURED_MS)
def test_steps_are_within_a_tenth_and_in_the_median_within_a_twentieth(mode: Mode, form: str) -> None:
    errors = {}
    assert noisy(mode, form) == NOISY.get((mode, form), set())
    for rows, measured_ms in MEASURED_MS[mode, form].items():
        times = _C.predict_step(rows, H200.core, SHAPE)
        errors[rows] = 1e3 * (times.was_s if mode == Mode.WAS else times.cas_s) / measured_ms - 1
    assert max(abs(error) for rows, error in errors.items() if rows not in noisy(mode, form)) <= 0.10, errors
    assert median(map(abs, errors.values())) <= 0.05, errors


@pytest.mark.parametrize("form", ["", "_graph"])
def test_the_mode_picked_is_the_faster_one_or_within_three_percent_of_it(form: str) -> None:
    both = [rows for rows in MEASURED_MS[Mode.CAS, form] if rows in MEASURED_MS[Mode.WAS, form]]
    assert both == [1, 16, 32, 64, 128, 256, 512, 768, 1024]
    for rows in both:
        picked = _C.decide(num_tokens=rows, max_rows=1024, shape=SHAPE, profile=H200.core).mode
        faster_ms = min(MEASURED_MS[mode, form][rows] for mode in (Mode.WAS, Mode.CAS))
        assert MEASURED_MS[picked, form][rows] <= 1.03 * faster_ms, rows


@pytest.mark.parametrize(
    ("mode", "subject"),
    [(Mode.WAS, f"sidp_was_{arrival}") for arrival in ("in_phase", "staggered", "random")]
    + [(Mode.CAS, "sidp_cas_all")],
)
def test_steps_of_four_replicas_are_within_a_tenth(mode: Mode, subject: str) -> None:
    """Three slots, where the table of contention has two: WaS is not as fast as predicted where both take as long."""
    steps_ms = medians("4x-nvidia-h200", "scale_steps", "step", subject, ranks=4)
    assert set(steps_ms) == ({128, 512, 1024, 2048} if mode == Mode.WAS else {128, 512, 1024})
    for rows, measured_ms in steps_ms.items():
        times = _C.predict_step(rows, H200.core, shape_of(4))
        assert 1e3 * (times.was_s if mode == Mode.WAS else times.cas_s) == pytest.approx(measured_ms, rel=0.10), rows


EARLY = pytest.mark.xfail(strict=True, reason="announced rows travel while the owner launches: 6.8 and 7.9 % too much")


@pytest.mark.parametrize("rows", [1, pytest.param(16, marks=EARLY), pytest.param(64, marks=EARLY)])
def test_a_request_costs_the_round_trip_and_its_rows(rows: int) -> None:
    """The round trip is that of one row; rows of 5120 there and back come on top at the link's rate."""
    measured_us = medians(MACHINE, "remote_compute", "over_local", "sidp_graph")[rows]
    rows_us = rows * 2 * 2 * 5120 / H200.copy_bytes_per_s * 1e6
    assert H200.round_trip_us + rows_us == pytest.approx(measured_us, rel=0.05)
