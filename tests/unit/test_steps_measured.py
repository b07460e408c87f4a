"""Steps measured on two H200 against the mode policy's formulas, whose inputs were measured apart (docs/model.md).

A step whose samples differ by more than 5 % of their median says little: the host was late in some eager ones. Such
rows count in the median alone, and are named here.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from helpers.bench_results import measured, medians, runs

from sidp_runtime import _C, Mode
from sidp_runtime.planner import GpuProfile, ModelShape

MACHINE = "2x-nvidia-h200"
H200 = GpuProfile.read("H200").rates
#: The shape that was measured, and how many layers of it, by results. The profile is of the first alone.
MACHINES = {
    MACHINE: ("Qwen/Qwen3-32B", 16),
    f"{MACHINE}-second-pair": ("Qwen/Qwen3-32B", 16),
    f"{MACHINE}-llama-3.1-70b": ("meta-llama/Llama-3.1-70B", 8),
}
MODES = [(mode, form) for mode in (Mode.WAS, Mode.CAS) for form in ("", "_graph")]


# The benchmark's step: each rank owns as many layers, one op from one attention to the next, no attention. A row goes
# as attention's result and the residual, and comes back as qkv and the residual.
def shape_of(world_size: int, machine: str = MACHINE) -> _C.StepShape:
    model, layers = MACHINES[machine]
    shape = ModelShape.read(model)
    layer_bytes = shape.linear_bytes // shape.num_layers
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return _C.StepShape(
        total_bytes=layers * layer_bytes,
        streamed_bytes=(layers - layers // world_size) * layer_bytes,
        streamed_layers=layers - layers // world_size,
        ops_per_layer=1,
        row_bytes=2 * ((q + shape.hidden) + (q + 2 * kv + shape.hidden)),
        element_bytes=2,
        world_size=world_size,
    )


def steps_of(machine: str, mode: Mode, form: str) -> dict[int, dict[str, Any]]:
    return measured(machine, "step_time", "step", f"sidp_{mode.name.lower()}{form}")


MOST_SPREAD = 0.05  # between the least and the greatest sample, of their median
NOISY = {
    (MACHINE, Mode.CAS, ""): {16, 64, 128},
    (MACHINE, Mode.CAS, "_graph"): {128},
    (f"{MACHINE}-second-pair", Mode.WAS, "_graph"): {4096},
    (f"{MACHINE}-second-pair", Mode.CAS, ""): {32, 64},
    (f"{MACHINE}-second-pair", Mode.CAS, "_graph"): {128},
    (f"{MACHINE}-llama-3.1-70b", Mode.WAS, ""): {4096},
    (f"{MACHINE}-llama-3.1-70b", Mode.CAS, ""): {64, 1024},
    (f"{MACHINE}-llama-3.1-70b", Mode.CAS, "_graph"): {128},
}


def test_the_bundled_profile_is_what_its_source_says() -> None:
    times = H200.linear_times
    assert times is not None
    local_ms = medians(MACHINE, "step_time", "step", "all_local_graph")
    assert dict(zip(times.rows, times.seconds, strict=True)) == pytest.approx(
        {rows: ms / 1e3 for rows, ms in local_ms.items()}, rel=1e-3
    )
    shape = ModelShape.read("Qwen/Qwen3-32B")
    assert times.num_bytes == 16 * shape.linear_bytes // shape.num_layers
    (link_gbps,) = medians(MACHINE, "step_time", "link", "cudaMemcpyAsync_write").values()
    assert H200.copy_bytes_per_s == pytest.approx(link_gbps * 1e9, rel=1e-3)
    request_us = medians(MACHINE, "remote_compute", "over_local", "sidp_graph")
    assert H200.round_trip_us == pytest.approx(request_us[1], rel=2e-3)
    many_rows_per_s = 255 * 2 * 2 * 5120 / (request_us[256] - request_us[1]) * 1e6
    assert H200.request_bytes_per_s == pytest.approx(many_rows_per_s, rel=2e-3)
    assert H200.memory_bytes_per_s == pytest.approx(times.num_bytes / times.seconds[0], rel=1e-3)
    assert H200.flops_per_s == pytest.approx(times.rows[-1] * times.num_bytes / times.seconds[-1], rel=1e-3)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("mode", "form"), MODES)
def test_steps_are_within_a_tenth_and_in_the_median_within_a_twentieth(machine: str, mode: Mode, form: str) -> None:
    steps = steps_of(machine, mode, form)
    noisy = {rows for rows, step in steps.items() if step["max"] - step["min"] > MOST_SPREAD * step["median"]}
    assert noisy == NOISY.get((machine, mode, form), set())
    errors = {}
    for rows, step in steps.items():
        times = _C.predict_step(rows, H200.core, shape_of(2, machine))
        errors[rows] = 1e3 * (times.was_s if mode == Mode.WAS else times.cas_s) / step["median"] - 1
    assert max(abs(error) for rows, error in errors.items() if rows not in noisy) <= 0.10, errors
    assert median(map(abs, errors.values())) <= 0.05, errors


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("form", ["", "_graph"])
def test_the_mode_picked_is_the_faster_one_or_within_three_percent_of_it(machine: str, form: str) -> None:
    was, cas = (steps_of(machine, mode, form) for mode in (Mode.WAS, Mode.CAS))
    assert set(cas) <= set(was)
    assert list(cas) == [1, 16, 32, 64, 128, 256, 512, 768, 1024]
    for rows in cas:
        taken = {Mode.WAS: was[rows]["median"], Mode.CAS: cas[rows]["median"]}
        picked = _C.decide(num_tokens=rows, max_rows=1024, shape=shape_of(2, machine), profile=H200.core).mode
        assert taken[picked] <= 1.03 * min(taken.values()), rows


def test_a_machine_that_was_calibrated_is_predicted_as_well() -> None:
    """``sidp calibrate --check`` on two H200: three ops a layer, and that machine's profile, measured just before."""
    (checked,) = runs("2x-nvidia-h200-calibration")
    steps = checked["steps"]
    assert [step["tokens"] for step in steps] == [1, 4, 16, 64, 256, 512, 1024, 2048, 4096]
    assert checked["job"]["num_layers"] == 8
    for mode in ("was", "cas"):
        errors = [step[f"{mode}_predicted_ms"] / step[f"{mode}_measured_ms"] - 1 for step in steps]
        assert max(map(abs, errors)) <= 0.10, errors
        assert median(map(abs, errors)) <= 0.05, errors
    assert max(step["loss"] for step in steps) <= 0.03


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


@pytest.mark.parametrize(
    ("rows", "bound"),
    [
        (1, 0.05),
        (16, 0.10),
        pytest.param(64, 0.10, marks=pytest.mark.xfail(strict=True, reason="16 % too much")),
        (256, 0.05),
    ],
)
def test_a_request_costs_the_round_trip_and_its_rows(rows: int, bound: float) -> None:
    """The round trip is that of one row; rows of 5120 there and back come on top at the rate of many.

    Up to 128 rows travel while the owner launches, which the formula does not know: 9 and 16 % too much, which is less
    than 1 % of a step of as many rows.
    """
    measured_us = medians(MACHINE, "remote_compute", "over_local", "sidp_graph")[rows]
    assert H200.request_bytes_per_s is not None
    rows_us = rows * 2 * 2 * 5120 / H200.request_bytes_per_s * 1e6
    assert H200.round_trip_us + rows_us == pytest.approx(measured_us, rel=bound)
