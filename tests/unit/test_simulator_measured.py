"""Steps that were measured, against what the simulator predicts from inputs measured apart (docs/simulator.md)."""

from __future__ import annotations

from random import Random
from statistics import mean, median

import pytest
from helpers.bench_results import figures, medians

from sidp_runtime import Mode
from sidp_runtime.errors import ConfigError
from sidp_runtime.simulator import scenarios, simulate
from sidp_runtime.simulator.scenarios import h20_eight, h200_pair

WITHIN = 0.10
PAIR = "2x-nvidia-h200"

H200_MS = {
    (mode, rows): measured_ms
    for mode in (Mode.WAS, Mode.CAS)
    for rows, measured_ms in medians(PAIR, "step_time", "step", f"sidp_{mode.name.lower()}_graph").items()
}


def test_slowdown_beside_copies_is_what_was_measured() -> None:
    slowdown = medians(PAIR, "gemm_beside_copies", "slowdown", "beside_copies")
    assert dict(scenarios.H200_SLOWDOWN) == pytest.approx(slowdown, abs=0.005)


@pytest.mark.parametrize(
    ("subject", "rate_gbps", "latency_us"),
    [
        ("cudaMemcpyAsync_write", scenarios.H200_LINK_GBPS, scenarios.H200_COPY_LATENCY_US),
        ("cudaMemcpyAsync", scenarios.H20_LINK_GBPS, scenarios.H20_COPY_LATENCY_US),
    ],
    ids=["written", "read"],
)
def test_links_and_latencies_are_what_was_measured(subject: str, rate_gbps: float, latency_us: float) -> None:
    """The latency: what 1 MiB took longer than at the rate of 1 GiB, both ways at once."""
    gbps = {
        figure["parameters"]["bytes"]: figure["median"]
        for figure in figures(PAIR)
        if (figure["case"], figure["subject"]) == ("link_bandwidth", subject)
        and figure["parameters"]["direction"] == "both"
    }
    assert rate_gbps == pytest.approx(gbps[1 << 30], rel=2e-4)
    assert latency_us == pytest.approx((1 << 20) / 1e3 * (1 / gbps[1 << 20] - 1 / gbps[1 << 30]), abs=0.05)


@pytest.mark.parametrize(("mode", "rows"), H200_MS)
def test_h200_pair(mode: Mode, rows: int) -> None:
    """All steps but the first, which is not counted where it is measured either."""
    replicas = simulate(h200_pair(rows, mode=mode, warm_slots=2)).replicas
    simulated_ms = mean(ms for replica in replicas for ms in replica.step_ms[1:])
    assert simulated_ms == pytest.approx(H200_MS[mode, rows], rel=WITHIN)


def slowest(start_ms: tuple[float, ...], **changes: int) -> float:
    """ms from its own start to the end of its copies, of the slowest rank."""
    return max(replica.total_ms for replica in simulate(h20_eight(0.0, start_ms=start_ms, **changes)).replicas)


def random_starts(most_ms: float, num_samples: int = 20, **changes: int) -> float:
    """Median over samples of the slowest rank, ranks starting at random in [0, most_ms]."""
    samples = []
    for sample in range(num_samples):
        random = Random(sample)
        samples.append(slowest(tuple(random.uniform(0, most_ms) for _ in range(8)), **changes))
    return median(samples)


@pytest.mark.parametrize("measured_ms", [76.60, 74.84], ids=["event", "flag"])
def test_h20_eight_one_ms_apart(measured_ms: float) -> None:
    assert slowest(tuple(map(float, range(8)))) == pytest.approx(measured_ms, rel=WITHIN)


@pytest.mark.parametrize(("most_ms", "measured_ms"), [(1.0, 88.13), (5.0, 80.25), (10.0, 77.24)])
def test_h20_eight_random_starts(most_ms: float, measured_ms: float) -> None:
    assert random_starts(most_ms) == pytest.approx(measured_ms, rel=WITHIN)


def test_h20_eight_continuous_arrivals() -> None:
    """Mean over replays of 1024 rows, each a random [0, 1] ms after the one before."""
    replicas = simulate(h20_eight(0.0, 1024, gap_ms=1.0, num_steps=32)).replicas
    assert mean(ms for replica in replicas for ms in replica.step_ms) == pytest.approx(71.44, rel=WITHIN)


def test_h20_eight_in_phase_depends_on_how_late_each_launch_is() -> None:
    """99.6 and 99.96 ms were measured with launches of unpublished lateness: exact phase is far slower.

    This pins the sensitivity that docs/simulator.md states. It is no reproduction: the lateness is no input we have.
    """
    assert slowest((0.0,) * 8) == pytest.approx(158.91, rel=0.01)
    late = [random_starts(most_ms) for most_ms in (0.1, 0.2, 0.3, 0.5)]
    assert 158 * 0.75 > late[0] == max(late)
    for most_ms, simulated_ms in zip((0.2, 0.3, 0.5), late[1:], strict=True):
        for measured_ms in (99.61, 99.96):
            assert simulated_ms == pytest.approx(measured_ms, rel=WITHIN), most_ms


def test_h20_eight_slices_help_ranks_that_start_together_and_less_so_apart() -> None:
    """Measured, 4096 rows, four slices over one: -9.7 % within 1 ms, -3.9 % within 10 ms."""
    near = random_starts(1.0, 6, slices=4, slice_group=7) / random_starts(1.0, 6)
    far = random_starts(10.0, 6, slices=4, slice_group=7) / random_starts(10.0, 6)
    assert near < 0.97
    assert near < far


def test_rows_that_were_not_measured_are_refused() -> None:
    with pytest.raises(ConfigError, match="100 rows were not measured; take one of 1, 16"):
        h200_pair(100)
