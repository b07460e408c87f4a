"""Steps that were measured, against what the simulator predicts from inputs measured apart (docs/simulator.md)."""

from __future__ import annotations

from random import Random
from statistics import mean, median

import pytest
from helpers.bench_results import medians

from sidp_runtime import Mode
from sidp_runtime.errors import ConfigError
from sidp_runtime.simulator import simulate
from sidp_runtime.simulator.scenarios import h20_eight, h200_pair

WITHIN = 0.10


H200_MS = {
    (mode, rows): measured_ms
    for mode in (Mode.WAS, Mode.CAS)
    for rows, measured_ms in medians("2x-nvidia-h200", "step_time", "step", f"sidp_{mode.name.lower()}_graph").items()
}


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
    assert slowest((0.0,) * 8) == pytest.approx(159.05, rel=0.01)
    late = [random_starts(most_ms) for most_ms in (0.1, 0.2, 0.3, 0.5)]
    assert 159 * 0.75 > late[0] == max(late)
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
